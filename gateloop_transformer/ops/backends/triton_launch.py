"""Launching Triton kernels, or writing down what would be launched: so it is compiled without a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Steps that the compiler loads ahead in loops.
STAGES = 2


class Launch(NamedTuple):
    """A kernel and its arguments by name; those that are constants of the compiled kernel are among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int


_written: list[Launch] | None = None
_written_for = "cuda"


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def listing() -> bool:
    """Whether launches are only written down."""
    return _written is not None


def target() -> str:
    """Who multiplies: "interpreter", "cuda" or "hip"."""
    if _written is not None:
        return _written_for
    if interpreted():
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


@contextlib.contextmanager
def written_down(target: str = "cuda") -> Iterator[list[Launch]]:
    """Inside, nothing is launched: launches are listed, as for this target.

    For tensors without memory; not for several threads.
    """
    global _written, _written_for
    before = _written, _written_for
    _written, _written_for = [], target
    try:
        yield _written
    finally:
        _written, _written_for = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, like: Tensor, warps: int, **more: Any) -> None:
    """Launch a kernel on the device of `like`."""
    if _written is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | more
        _written.append(Launch(kernel, grid, named, warps))
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **more, num_warps=warps, num_stages=STAGES)


def precision(dtype: torch.dtype) -> Any:
    """Triton's name of the precision of the arithmetic."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def power(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()
