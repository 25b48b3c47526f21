"""Complex numbers as pairs of real tensors: what crosses operator boundaries instead of complex dtypes.

Compilers do not generate code for complex dtypes and some devices lack them; two real tensors work
everywhere. An absent imaginary part means "real", and no arithmetic is spent on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """re + i·im, both of one shape; im is None where the number is real."""

    re: Tensor
    im: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """`function` of each part."""
        return Pair(function(self.re), None if self.im is None else function(self.im))

    def parts(self) -> list[Tensor]:
        """[re] or [re, im]: how a pair crosses the boundary of a custom operator."""
        return [self.re] if self.im is None else [self.re, self.im]

    def both(self) -> tuple[Tensor, Tensor]:
        """Both parts of a number that has two."""
        assert self.im is not None
        return self.re, self.im

    def as_complex(self) -> Pair:
        """The same number with an imaginary part, zero where there was none."""
        return self if self.im is not None else Pair(self.re, torch.zeros_like(self.re))

    def to(self, dtype: torch.dtype) -> Pair:
        """Both parts in `dtype`."""
        return self.map(lambda part: part.to(dtype))

    def select(self, dim: int, index: int) -> Pair:
        """Both parts at one index of one dimension, as views."""
        return self.map(lambda part: part.select(dim, index))

    def narrow(self, dim: int, start: int, length: int) -> Pair:
        """Both parts over a stretch of one dimension, as views."""
        return self.map(lambda part: part.narrow(dim, start, length))

    def conj(self) -> Pair:
        """re - i·im."""
        return Pair(self.re, None if self.im is None else -self.im)

    def times(self, other: Pair) -> Pair:
        """The complex product, broadcasting."""
        if self.im is None:
            return other.map(lambda part: self.re * part)
        if other.im is None:
            return Pair(self.re * other.re, self.im * other.re)
        re = torch.addcmul(self.re * other.re, self.im, other.im, value=-1)
        return Pair(re, torch.addcmul(self.re * other.im, self.im, other.re))

    def plus(self, other: Pair) -> Pair:
        """The complex sum, broadcasting."""
        if self.im is None or other.im is None:
            im = other.im if self.im is None else self.im
            return Pair(self.re + other.re, im)
        return Pair(self.re + other.re, self.im + other.im)

    def over(self, function: Callable[[Tensor, Tensor], Tensor], real: Tensor) -> Pair:
        """`function(part, real)` of each part: a product with a real tensor, of whatever kind."""
        return self.map(lambda part: function(part, real))

    def complex(self) -> Tensor:
        """One tensor: complex where there is an imaginary part, real otherwise."""
        return self.re if self.im is None else torch.complex(self.re, self.im)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The precision of state and gate arithmetic: float64 where any of `dtypes` has it, else float32."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(dtype in wide for dtype in dtypes) else torch.float32


def autocasts(x: Tensor) -> bool:
    """Whether torch's autocast is on for x's device; where there are no values there is none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, nothing on x's device is narrowed."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that torch's autocast would multiply x in; None where it is off, or leaves x alone."""
    if x.dtype == torch.float64 or not autocasts(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def one_width(*pairs: Pair) -> tuple[Pair, ...]:
    """All in float64 if one is: a kernel computes in one precision."""
    if not any(pair.re.dtype == torch.float64 for pair in pairs):
        return pairs
    return tuple(pair.to(torch.float64) for pair in pairs)


def split(value: Tensor | tuple[Tensor, Tensor]) -> Pair:
    """A real tensor, a complex tensor or a tuple (real, imaginary) as a Pair."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        return Pair(*value)
    if not isinstance(value, Tensor):
        raise ValueError(f"expected a tensor or a tuple (real, imaginary) of tensors, not {type(value).__name__}")
    if value.is_complex():
        value = value.resolve_conj()
        return Pair(value.real, value.imag)
    return Pair(value)


def take(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """`tensors` cut into lists of these lengths."""
    rest = iter(tensors)
    return [[next(rest) for _ in range(length)] for length in lengths]
