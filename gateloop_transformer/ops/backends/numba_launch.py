"""Runs a kernel over many items of work on torch's own threads.

A kernel is a machine function of one pointer to 64-bit integers: its arguments. The first three are the launcher's:
the next item to be taken, the next scratch slot to be taken, the number of items. Threads take items until none is
left; an item's result depends on nothing but the item, so results do not depend on the threads.

Where torch uses OpenMP, threads are those of its pool: one pool less to wake, and none that spins while another works.
Elsewhere, a pool of Python threads does the same (a running kernel does not hold the interpreter). A process made by
fork runs kernels on its only thread: pools do not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gateloop_transformer.ops.backends.numba_cache import Kernel

HEADER = 3
# So many numbers one thread works through alone: waking another costs more than the few steps of a decoded token.
ALONE = 1 << 14

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _openmp() -> Any:
    """The entry to the parallel regions of the OpenMP that torch was linked with; None where it was not."""
    folder = Path(torch.__file__).parent / "lib"
    for library in sorted(folder.glob("libtorch_cpu.*")):
        with contextlib.suppress(OSError, AttributeError):
            # A symbol is looked for in the library and all that it was linked with.
            entry = ctypes.CDLL(str(library)).GOMP_parallel
            entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            entry.restype = None
            return entry
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="gateloop")


def threads_for(items: int, numbers: int | None = None) -> int:
    """How many threads will share this many items, which are so many numbers (None: many) together."""
    if _forked or (numbers is not None and numbers <= ALONE):
        return 1
    return max(1, min(items, torch.get_num_threads()))


def launch(
    kernel: Kernel, items: int, arguments: list[int], numbers: int | None = None
) -> ctypes.Array[ctypes.c_int64]:
    """Run `kernel` over `items` items on as many threads as `threads_for` says.

    Returns:
        The kernel's arguments, header first, as it left them.
    """
    threads = threads_for(items, numbers)
    block = (ctypes.c_int64 * (HEADER + len(arguments)))(0, 0, items, *arguments)
    if threads == 1:
        kernel.call(block)
        return block
    openmp = _openmp()
    if openmp is not None:
        openmp(kernel.address, ctypes.addressof(block), threads, 0)
        return block
    helpers = [_pool(threads).submit(kernel.call, block) for _ in range(threads - 1)]
    kernel.call(block)
    for helper in helpers:
        helper.result()
    return block
