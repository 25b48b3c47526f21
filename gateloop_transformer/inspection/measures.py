"""Gates in figures: half-lives, where memory fades, spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Gates = npt.NDArray[np.complex128]
Reals = npt.NDArray[np.float64]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Smaller magnitudes count as this one, because the logarithm of 0 has no mean.
_TINY = float(np.finfo(np.float32).tiny)
# Half-lives of a histogram, as powers of 2: from 1/8 token to a million.
_SHORTEST, _LONGEST = -3, 20
# Cells of the complex plane along each axis, from -1 to 1.
CELLS = 48


def decays(gates: Gates) -> Reals:
    """The decay -log|a|, in nats per token; 0 keeps everything."""
    magnitude: Reals = -np.log(np.clip(np.abs(gates), _TINY, None))
    return np.clip(magnitude, 0, None)


def half_lives(gates: Gates) -> Reals:
    """The number of tokens like this one after which half of the memory is left: log 2 / -log|a|; infinite at |a| = 1.

    >>> half_lives(np.array([0.5, -0.5, 1.0, 0.0])).round(3).tolist()
    [1.0, 1.0, inf, 0.008]
    """
    with np.errstate(divide="ignore"):
        lives: Reals = math.log(2) / decays(gates)
    return lives


def phases(gates: Gates) -> Reals:
    """The phases in radians, in (-π, π]; that of a real gate is 0 or π."""
    angles: Reals = np.angle(gates)
    # A negative real part with an imaginary part of -0.0 gives -π.
    return np.where(angles <= -math.pi, math.pi, angles)


def quantiles(values: Reals, axis: int | None = None) -> Reals:
    """The `QUANTILES` of values, each one of the values, because infinite ones cannot be interpolated."""
    return np.quantile(values, QUANTILES, axis=axis, method="nearest")


def finite(value: float) -> float | str:
    """Make a number fit for JSON: infinity becomes "∞"."""
    return "∞" if math.isinf(value) else float(value)


class ClassFigures(NamedTuple):
    """The gates of one layer at the tokens of a class.

    tokens: number of tokens. half_life: the median over tokens and heads. decay: the mean of -log|a|, nats per token.
    ratio: ratio of the decay to that over all tokens; above 1, more is forgotten than elsewhere; None: nothing is
    forgotten anywhere.
    """

    tokens: int
    half_life: float
    decay: float
    ratio: float | None

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {**self._asdict(), "half_life": finite(self.half_life)}


def by_class(gates: Gates, classes: Mapping[str, npt.NDArray[np.bool_]]) -> dict[str, ClassFigures]:
    """Measure a layer's gates (T, heads) at the tokens of each class (T,)."""
    lives, lost = half_lives(gates), decays(gates)
    average = float(lost.mean())
    return {
        name: ClassFigures(
            int(own.sum()),
            float(np.quantile(lives[own], 0.5, method="nearest")),
            float(lost[own].mean()),
            float(lost[own].mean()) / average if average else None,
        )
        for name, own in classes.items()
    }


def histogram_of_half_lives(gates: Gates) -> list[dict[str, Any]]:
    """Shares of gates by half-life, in octaves from the shortest to the longest: "from" and "to" in tokens.

    The first of 1/8 token also has what is shorter, the last of a million what is longer; infinite ones are apart.
    """
    lives = half_lives(gates).ravel()
    ended = lives[np.isfinite(lives)]
    powers = np.clip(np.floor(np.log2(ended)), _SHORTEST, _LONGEST).astype(int)
    rows: list[dict[str, Any]] = [
        {"from": 2.0**power, "to": 2.0 ** (power + 1), "share": float((powers == power).sum() / lives.size)}
        for power in (range(powers.min(), powers.max() + 1) if len(powers) else ())
    ]
    if len(ended) < lives.size:
        rows.append({"from": "∞", "to": "∞", "share": 1 - len(ended) / lives.size})
    return rows


def spectrum(gates: Gates) -> npt.NDArray[np.int64]:
    """Count the gates in each cell of the complex plane, (CELLS, CELLS): rows by imaginary part, upwards from -1."""
    flat = gates.ravel()
    # A magnitude of 1 lies in the last cell.
    places = [np.clip(((part + 1) / 2 * CELLS).astype(int), 0, CELLS - 1) for part in (flat.imag, flat.real)]
    counts = np.bincount(places[0] * CELLS + places[1], minlength=CELLS * CELLS)
    return counts.reshape(CELLS, CELLS)


def heads_by_half_life(gates: Gates) -> npt.NDArray[np.int64]:
    """The heads' numbers (heads,), those that forget fastest first, by the median over the text."""
    medians = np.quantile(half_lives(gates), 0.5, axis=0, method="nearest")
    return np.argsort(medians, kind="stable")


def some_of(order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` (at least 2), the first and the last among them, evenly apart."""
    if len(order) <= count:
        return order
    some: npt.NDArray[np.int64] = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    return some
