"""Checks of arguments that layers and models share in torch and JAX; imports neither."""

from __future__ import annotations

import math
from numbers import Integral

# The dtypes that `quantize` can give the weights of Linear layers.
WEIGHT_KINDS = ("float32", "bfloat16", "int8")


def check_release(what: str, package: str, installed: str, least: str) -> None:
    """Refuse what an installed release of a package is too old for.

    Args:
        what: the feature that was asked for, for the error.
        package: name of the package.
        installed: its installed version, such as "2.6.0+cpu".
        least: "major.minor" of the first release that has the feature.

    Raises:
        ValueError: the installed release is older.
    """
    found, wanted = ([int(part) for part in version.split(".")[:2]] for version in (installed, least))
    if found < wanted:
        raise ValueError(f"{what} needs {package} {least} or newer, not {installed}")


def check_fraction(layer: str, name: str, fraction: float) -> None:
    """Check that a factor on a gradient is a finite number.

    Raises:
        ValueError: it is not.
    """
    if not math.isfinite(fraction):
        raise ValueError(f"{layer}: {name} must be finite, not {fraction}")


def check_start(layer: str, gate: str, spread_start: bool | None, fixed_gates: bool) -> None:
    """Check that this kind of gate can have a spread start, or be independent of the data, where that is asked for.

    Raises:
        ValueError: it cannot.
    """
    if spread_start and gate == "polar":
        raise ValueError(f"{layer}: spread_start needs gate 'ring' or 'paper': memories of 'polar' gates are 2 or more")
    if fixed_gates and gate != "ring":
        raise ValueError(f"{layer}: fixed_gates needs gate 'ring', not {gate!r}")
    if fixed_gates and spread_start is False:
        raise ValueError(f"{layer}: fixed_gates need a spread start, as nothing else sets the memories apart")


def check_sizes(layer: str, **sizes: int | None) -> None:
    """Check that sizes are whole numbers of at least 1, or None.

    Raises:
        ValueError: one is not.
    """
    wrong = [
        f"{name}={size!r}"
        for name, size in sizes.items()
        if size is not None and (not isinstance(size, Integral) or isinstance(size, bool) or size < 1)
    ]
    if wrong:
        raise ValueError(f"{layer}: sizes must be whole numbers of at least 1, not {', '.join(wrong)}")


def check_rank(layer: str, gate_rank: int | None, fixed_gates: bool) -> None:
    """Check that the rank of the gate projection is a size, and that the gates have such a projection.

    Raises:
        ValueError: it is not a size, or the gates do not depend on the data.
    """
    check_sizes(layer, gate_rank=gate_rank)
    if gate_rank is not None and fixed_gates:
        raise ValueError(f"{layer}: fixed_gates do not depend on the data, so a gate_rank ({gate_rank}) has no meaning")


def parse_pattern(pattern: str, depth: int) -> list[str]:
    """The mixer of each layer: the words of `pattern` ("gate", "attention"), repeated up to `depth`.

    Raises:
        ValueError: the pattern is empty or has another word.

    >>> parse_pattern("gate gate attention", 4)
    ['gate', 'gate', 'attention', 'gate']
    """
    words = pattern.split()
    unknown = sorted(set(words) - {"gate", "attention"})
    if not words or unknown:
        raise ValueError(
            f"layer_pattern must be words 'gate' and 'attention', for example 'gate gate attention', not {pattern!r}"
        )
    return [words[n % len(words)] for n in range(depth)]
