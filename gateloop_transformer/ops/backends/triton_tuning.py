"""Block sizes: the first of a handful, or the fastest of them, timed once for a class of shapes and kept on disk.

GATELOOP_TRITON_TUNING=off takes the first, as does torch.use_deterministic_algorithms(True): another block size is
another order of sums.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gateloop_transformer.ops.backends.triton_launch import listing

Choice = TypeVar("Choice")

_FILE = "choice.txt"
_known: dict[tuple[Any, ...], int] = {}
_forced: int | None = None


@contextlib.contextmanager
def forced(number: int) -> Iterator[None]:
    """Inside, the choice of this number is taken, or the last; not for several threads."""
    global _forced
    before, _forced = _forced, number
    try:
        yield
    finally:
        _forced = before


def fastest(
    kernel: str, shapes: tuple[object, ...], choices: Sequence[Choice], run: Callable[[Choice], None], x: Tensor
) -> Choice:
    """The choice with which `run` takes the least time on the device of x.

    Args:
        kernel: its name.
        shapes: the class of what it is run on, and what the choices are: what was timed once in it is not again.
        choices: the first is taken where nothing is to be timed.
        run: launches the kernel; may be called several times.
        x: a tensor on the device.
    """
    if _forced is not None:
        return choices[min(_forced, len(choices) - 1)]
    if len(choices) == 1 or not _times(x):
        return choices[0]
    # Looked up at every launch: what is hashed for the disk is so only where this is not known.
    place = (x.device, kernel, shapes)
    if place not in _known:
        _known[place] = _found(place, choices, run)
    return choices[_known[place]]


def _found(place: tuple[Any, ...], choices: Sequence[Choice], run: Callable[[Choice], None]) -> int:
    """The number of the fastest, from disk if an earlier process has timed them."""
    import triton

    device, kernel, shapes = place
    about = (torch.cuda.get_device_name(device), triton.__version__, kernel, shapes)
    key = hashlib.sha256(repr(about).encode()).hexdigest()
    number = _read(key, len(choices))
    if number < 0:
        times = [_milliseconds(partial(run, choice)) for choice in choices]
        number = times.index(min(times))
        _write(key, number)
    return number


def _times(x: Tensor) -> bool:
    """Whether kernels may be timed now: a graph that is being captured would have all of it."""
    off = os.environ.get("GATELOOP_TRITON_TUNING", "on") in ("off", "0")
    if off or listing() or not x.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))


def _read(key: str, choices: int) -> int:
    """What an earlier process found; -1 if none has, or what it wrote is not a choice."""
    from triton.runtime.cache import get_cache_manager

    path = get_cache_manager(key).get_file(_FILE)
    if path is None:
        return -1
    with open(path, encoding="utf-8") as file:
        said = file.read()
    return int(said) if said.isdecimal() and int(said) < choices else -1


def _write(key: str, number: int) -> None:
    from triton.runtime.cache import get_cache_manager

    get_cache_manager(key).put(str(number), _FILE, binary=False)
