"""The loss curve of a run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


def draw_curve(metrics: Path, target: Path) -> None:
    """Bits per byte against steps: training (faint, and smoothed) and validation.

    Args:
        metrics: a metrics.jsonl.
        target: the PNG to write, whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [(record["step"], record["loss"] / math.log(2)) for record in records if "loss" in record]
    valid = [(record["step"], record["bits_per_byte"]) for record in records if "bits_per_byte" in record]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(list(losses)), color="tab:blue", label="training (smoothed)")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    if train or valid:
        axes.legend()
    aside = target.with_name(target.name + ".partial")
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, target)


def _smooth(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential moving average without bias at the start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = memory * average + (1 - memory) * value, memory * weight + (1 - memory)
        smoothed.append(average / weight)
    return smoothed
