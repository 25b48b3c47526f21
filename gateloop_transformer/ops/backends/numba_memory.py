"""Memory for what kernels write, and what kernels call the types of it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

# Above this size fresh memory is asked for in huge pages, where the system has them: mapping small ones costs more
# than filling them.
_HUGE = 1 << 22


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """Linux's call to ask for huge pages."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call


def new_memory(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh memory."""
    return in_huge_pages(like.new_empty(shape, dtype=dtype))


def in_huge_pages(x: Tensor) -> Tensor:
    """x, its memory asked for in huge pages if there is much of it. A wish: refused, the memory is as good."""
    advise = _advise() if x.nbytes >= _HUGE else None
    if advise is not None:
        start = -(-x.data_ptr() // 4096) * 4096
        advise(start, (x.data_ptr() + x.nbytes - start) // 4096 * 4096, 14)
    return x


def start_of(x: Tensor, reverse: bool) -> list[int]:
    """Where x (B, T, ·) begins, at the last step if `reverse`: address, strides of batch and time in bytes."""
    batch, time = (stride * x.element_size() for stride in x.stride()[:2])
    return [x.data_ptr() + (x.shape[1] - 1) * time, batch, -time] if reverse else [x.data_ptr(), batch, time]


@functools.cache
def kind_of(dtype: torch.dtype) -> int:
    """How kernels call a dtype."""
    from gateloop_transformer.ops.backends import numba_simd as simd

    kinds = {torch.float64: simd.F64, torch.bfloat16: simd.BF16, torch.float16: simd.F16}
    return kinds.get(dtype, simd.F32)
