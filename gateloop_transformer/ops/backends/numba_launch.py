"""Compiles kernels, keeps them on disk, and runs one over many items of work on torch's own threads.

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
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, types

HEADER = 3
# So many numbers one thread works through alone: waking another costs more than the few steps of a decoded token.
ALONE = 1 << 14

_SIGNATURE = types.void(types.CPointer(types.int64))
_compiling = threading.Lock()
# Seconds to wait for another process that compiles: kernels take it a few each.
_patience = 120.0
_forked = False


def _after_fork() -> None:
    global _forked, _compiling
    _forked = True
    _compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Kernel:
    """A compiled kernel: its address, and the object that keeps it in memory."""

    def __init__(self, compiled: Any) -> None:
        self.address: int = compiled.address
        self.call: Callable[[Any], None] = compiled.ctypes
        self._compiled = compiled


@functools.cache
def _sources() -> str:
    """A fingerprint of all files that kernels are made of; Numba looks at the one that a kernel is defined in."""
    files = sorted(Path(__file__).parent.glob("numba_*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def compiled(function: Callable[[Any], None]) -> Kernel:
    """Machine code for `function`, from the disk if it was compiled before by any process."""
    function.__qualname__ += f"_{_sources()}"
    with _compiling, _one_process_at_a_time() as cached:
        if cached:
            try:
                return Kernel(cfunc(_SIGNATURE, cache=True)(function))
            except RuntimeError as error:
                # No folder to keep it in can be written.
                if "cannot cache" not in str(error):
                    raise
        return Kernel(cfunc(_SIGNATURE)(function))


@contextlib.contextmanager
def _one_process_at_a_time() -> Iterator[bool]:
    """Whether a lock between processes was had: Numba's cache numbers its files without one."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    owner = os.getuid()
    path = Path(tempfile.gettempdir()) / f"gateloop-numba-{owner}.lock"
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(path.open("wb"))
            had = _wait(lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except OSError:
            had = False
        yield had


def _wait(lock: Callable[[], None]) -> bool:
    """Whether a lock was had within `_patience`; where it was not, its owner may be stopped, and nobody waits again."""
    global _patience
    deadline = time.monotonic() + _patience
    while True:
        try:
            lock()
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                _patience = 0.0
                return False
        time.sleep(0.02)


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


def launch(kernel: Kernel, items: int, arguments: list[int], numbers: int | None = None) -> None:
    """Run `kernel` over `items` items on as many threads as `threads_for` says."""
    threads = threads_for(items, numbers)
    block = (ctypes.c_int64 * (HEADER + len(arguments)))(0, 0, items, *arguments)
    if threads == 1:
        kernel.call(block)
        return
    openmp = _openmp()
    if openmp is not None:
        openmp(kernel.address, ctypes.addressof(block), threads, 0)
        return
    helpers = [_pool(threads).submit(kernel.call, block) for _ in range(threads - 1)]
    kernel.call(block)
    for helper in helpers:
        helper.result()
