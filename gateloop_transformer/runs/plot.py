"""Loss curves: of one run as it goes, of several runs together, and of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from gateloop_transformer.pictures import empty_figure, name_lines, save_png
from gateloop_transformer.runs.curves import AGAINST, Curve, curve_of, read_records, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"tokens": "tokens", "time": "training time", "steps": "steps"}
# Seconds in a unit, the largest first.
_UNITS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
_SEEN = "bits per byte"


def check_png(target: Path) -> None:
    """A PNG may be written there: a new file, or in place of a PNG.

    Raises:
        ValueError: it may not.
    """
    where = repr(str(target))
    if target.suffix.lower() != ".png":
        raise ValueError(f"{where} is no name of a PNG: it must end in .png")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{where} is a folder" if target.is_dir() else f"no folder {str(target.parent)!r}")
    if target.exists():
        with target.open("rb") as file:
            if file.read(4) != b"\x89PNG":
                raise ValueError(f"{where} exists and is no PNG: it is left as it is")


def draw_curve(metrics: Path, target: Path) -> None:
    """Bits per byte against steps: training (faint, and smoothed) and validation.

    Args:
        metrics: a metrics.jsonl.
        target: the PNG to write, whole or not at all.
    """
    figure = empty_figure(7, 4.5)
    axes = figure.subplots()
    curve = curve_of(read_records(metrics), "")
    train, valid = curve.train, curve.valid
    if train.bits:
        axes.plot(train.steps, train.bits, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(train.steps, _smooth(train.bits), color="tab:blue", label="training (smoothed)")
    if valid.bits:
        axes.plot(valid.steps, valid.bits, "o-", color="tab:orange", label="validation")
    axes.set(xlabel="steps", ylabel=_SEEN)
    axes.grid(alpha=0.3)
    if train.steps or valid.steps:
        axes.legend()
    save_png(figure, target)


def draw_curves(curves: Sequence[Curve], target: Path, against: Sequence[str] = AGAINST) -> None:
    """Several runs in one figure, a panel for each of `against`; training faint and smoothed, validation dotted.

    Args:
        curves: at least one.
        target: the PNG to write, whole or not at all.
        against: some of `AGAINST`.
    """
    columns = min(len(curves), 3 if len(against) > 1 else 2)
    rows = math.ceil(len(curves) / columns)
    figure = empty_figure(1.2 + 4.6 * len(against) if len(against) > 1 else 7.5, 4.6 + 0.22 * rows)
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    colors = _colors(len(curves))
    limits = _limits(curves)
    for axes, what in zip(panels, against, strict=True):
        unit, label = _axis(curves, what)
        for curve, color in zip(curves, colors, strict=True):
            _draw(axes, curve, what, unit, color)
        if what != "time" and _spread(curves, what) > 30:
            axes.set_xscale("log")
        axes.set(xlabel=label, ylim=limits)
        axes.grid(alpha=0.3, which="both" if axes.get_xscale() == "log" else "major")
        if what == "tokens":
            axes.xaxis.set_major_formatter(_amount)
    panels[0].set_ylabel(_SEEN)
    figure.supxlabel("lines: training, smoothed · dots: validation", fontsize="small", color="dimgray")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    name_lines(legend, [curve.name for curve in curves])
    save_png(figure, target)


def draw_rates(groups: dict[str, list[tuple[float, float]]], target: Path) -> None:
    """Validation against the learning rate: a line for each group of runs that are alike but for it.

    Args:
        groups: by name, (learning rate, bits per byte); several at the same rate are seeds: the line is their mean.
        target: the PNG to write, whole or not at all.
    """
    figure = empty_figure(7, 4.5)
    axes = figure.subplots()
    for (name, points), color in zip(groups.items(), _colors(len(groups)), strict=True):
        rates = sorted({rate for rate, _ in points})
        means = [fmean([bits for rate, bits in points if rate == each]) for each in rates]
        axes.plot(*zip(*points, strict=True), "o", color=color, alpha=0.4)
        axes.plot(rates, means, "-", color=color, label="group" if name else None)
    rates = sorted({rate for points in groups.values() for rate, _ in points})
    axes.set_xscale("log")
    if len(rates) <= 8:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xticks([], minor=True)
    axes.set(xlabel="peak learning rate", ylabel=f"validation, {_SEEN}")
    axes.grid(alpha=0.3)
    if any(groups):
        name_lines(axes.legend(), filter(None, groups))
    save_png(figure, target)


def draw_positions(rows: Sequence[dict[str, Any]], context: int, target: Path) -> None:
    """The loss against how many tokens of a window were read before, on a logarithmic axis.

    Args:
        rows: of spans: "from", "to", "loss" (nats per token).
        context: tokens that a window of training predicts: marked.
        target: the PNG to write, whole or not at all.
    """
    figure = empty_figure(7, 4.5)
    axes: Any = figure.subplots()
    places = [math.sqrt(row["from"] * row["to"]) for row in rows]
    axes.plot(places, [row["loss"] for row in rows], "o-")
    axes.axvline(context, color="tab:gray", linestyle="--", label="training context")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens read before", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, target)


def _amount(value: float, _place: int | None = None) -> str:
    """A number of tokens with a prefix.

    >>> _amount(250_000), _amount(2.5e9)
    ('250 k', '2.5 B')
    """
    for prefix, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g} {prefix}"
    return f"{value:g}"


def _colors(count: int) -> list[Any]:
    """Ten that differ at a glance; for more runs, a scale."""
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](n) for n in range(count)]
    return [colormaps["viridis"](0.95 * n / (count - 1)) for n in range(count)]


def _draw(axes: Axes, curve: Curve, what: str, unit: float, color: Any) -> None:
    """One run: faint losses, their average, validation points. One of them is labelled, for the legend to name."""
    train, valid = curve.train, curve.valid
    if train.bits:
        places = [value / unit for value in train.against(what)]
        axes.plot(places, train.bits, color=color, alpha=0.12, linewidth=0.8)
        axes.plot(places, _smooth(train.bits), color=color, label="run")
    places = [value / unit for value in valid.against(what)]
    style, label = ("o", None) if train.bits else ("o-", "run")
    axes.plot(places, valid.bits, style, color=color, label=label, markeredgecolor="white", zorder=3)


def _axis(curves: Sequence[Curve], what: str) -> tuple[float, str]:
    """What to divide the axis by, and its label."""
    if what != "time":
        return 1.0, _LABELS[what]
    longest = max((value for value in values_of(curves, what)), default=0.0)
    name = next((name for name, seconds in _UNITS.items() if longest >= 2 * seconds), "seconds")
    return _UNITS[name], f"{_LABELS[what]}, {name}"


def _spread(curves: Sequence[Curve], what: str) -> float:
    """How far the lengths of the runs are apart, as a ratio."""
    ends = [max(values, default=0.0) for values in (values_of([curve], what) for curve in curves)]
    ends = [end for end in ends if end > 0]
    return max(ends) / min(ends) if ends else 1.0


def _limits(curves: Sequence[Curve]) -> tuple[float, float] | tuple[None, None]:
    """The heights to show: from the least to where the smoothed losses are after the first tenth, or all of it."""
    shown = []
    for curve in curves:
        losses = [bits for bits in _smooth(curve.train.bits) if math.isfinite(bits)]
        shown += losses[len(losses) // 20 :] + [bits for bits in curve.valid.bits if math.isfinite(bits)]
    if not shown or max(shown) == min(shown):
        return None, None
    margin = 0.05 * (max(shown) - min(shown))
    return min(shown) - margin, max(shown) + margin


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average whose memory grows to 0.95: short at the start, where losses fall fast."""
    average, smoothed = 0.0, []
    for n, value in enumerate(values):
        memory = min(0.95, n / (n + 8))
        average = memory * average + (1 - memory) * value
        smoothed.append(average)
    return smoothed
