"""Draws the pictures of the page as PNGs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gateloop_transformer.inspection.measures import Gates, half_lives, heads_by_half_life, phases, spectrum
from gateloop_transformer.inspection.report import Report
from gateloop_transformer.pictures import empty_figure, load_matplotlib, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: Report, folder: Path, done: Callable[[int], object] | None = None) -> list[Path]:
    """Draw layer-N.png for each layer with gates, spectrum.png and classes.png, if any has; each whole or not at all.

    Args:
        report: what to draw.
        folder: where to write the files.
        done: called with 1 after each layer.

    Returns:
        The paths of the files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    layers = [layer for layer in report.trace.layers if layer.gates is not None]
    written = []
    for layer in layers:
        assert layer.gates is not None
        written.append(folder / f"layer-{layer.layer}.png")
        _draw_layer(layer.gates, f"layer {layer.layer}: {layer.mixer}", written[-1])
        if done is not None:
            done(1)
    if layers:
        named = {layer.layer: layer.gates for layer in layers if layer.gates is not None}
        written += [folder / "spectrum.png", folder / "classes.png"]
        _draw_spectra(named, written[-2])
        _draw_classes(report, written[-1])
    return written


def _draw_layer(gates: Gates, title: str, target: Path) -> None:
    """Draw half-lives and phases of all heads at all tokens."""
    load_matplotlib()
    from matplotlib.colors import LogNorm

    order = heads_by_half_life(gates)
    figure = empty_figure(11, 6.5)
    above, below = figure.subplots(2, 1, sharex=True)
    lives = half_lives(gates[:, order]).T
    low, high = _range(lives)
    shown = np.where(np.isinf(lives), 2 * high, lives)
    image = _matrix(above, shown, cmap="viridis", norm=LogNorm(low, high))
    bar = figure.colorbar(image, ax=above, label="half-life, tokens", extend="both")
    if np.isinf(lives).all():
        bar.set_ticks([high], labels=["∞"], minor=False)
        bar.set_ticks([], minor=True)
    image = _matrix(below, phases(gates[:, order]).T, cmap="twilight", vmin=-math.pi, vmax=math.pi)
    bar = figure.colorbar(image, ax=below, label="phase, radians")
    bar.set_ticks([-math.pi, 0, math.pi], labels=["−π", "0", "π"])
    for axes in (above, below):
        axes.set_ylabel("heads by half-life")
        if len(order) <= 16:
            axes.set_yticks(range(len(order)), [str(head + 1) for head in order])
    below.set_xlabel("token")
    figure.suptitle(title)
    save_png(figure, target)


def _matrix(axes: Axes, values: npt.NDArray[np.float64], **options: Any) -> Any:
    return axes.imshow(values, aspect="auto", interpolation="nearest", **options)


def _range(lives: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The range of half-lives that the colours span."""
    ended = lives[np.isfinite(lives)]
    if not len(ended):
        return 1.0, 2.0
    low, high = (float(value) for value in np.quantile(ended, (0.02, 0.98)))
    return low, max(high, 1.01 * low)


def _draw_spectra(layers: dict[int, Gates], target: Path) -> None:
    """Draw each layer's gates in the complex plane."""
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = empty_figure(0.5 + 3 * columns, 0.6 + 3.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    angles = np.linspace(0, 2 * math.pi, 181)
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    for (number, gates), axes in zip(layers.items(), panels[: len(layers)], strict=True):
        counts = spectrum(gates)
        seen = np.ma.masked_equal(np.log10(np.maximum(counts, 0.1)), -1.0)
        image = axes.imshow(seen, origin="lower", extent=(-1, 1, -1, 1), cmap="viridis", vmin=0)
        axes.plot(np.cos(angles), np.sin(angles), color="gray", linewidth=0.8)
        axes.set(title=f"layer {number}", xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
        figure.colorbar(image, ax=axes, shrink=0.7, label="gates, log₁₀" if number == max(layers) else None)
    figure.suptitle("gates in the complex plane, all heads and tokens")
    save_png(figure, target)


def _draw_classes(report: Report, target: Path) -> None:
    """Draw how fast memory fades at tokens of each class, relative to each layer's average."""
    layers = [layer for layer in report.figures["layers"] if layer["heads"]]
    names = list(layers[0]["by_class"])
    ratios = np.array([[layer["by_class"][name]["ratio"] for layer in layers] for name in names], float)
    figure = empty_figure(3.2 + 0.9 * len(layers), 1.6 + 0.42 * len(names))
    axes = figure.subplots()
    # Where nothing is ever forgotten there is no ratio, and a token of no decay has no logarithm.
    powers = np.log2(np.clip(np.nan_to_num(ratios, nan=1.0), 1e-3, None))
    image = _matrix(axes, powers, cmap="RdBu_r", vmin=-2, vmax=2)
    for row, column in np.ndindex(*ratios.shape):
        ratio, color = ratios[row, column], "white" if abs(powers[row, column]) > 1.2 else "black"
        axes.text(column, row, "–" if np.isnan(ratio) else f"×{ratio:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="layer", title="how fast memory fades,\nagainst the layer's average")
    bar = figure.colorbar(image, ax=axes, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["×¼", "×½", "×1", "×2", "×4"])
    save_png(figure, target)
