"""Figures of docs/results, drawn from the rows that its pages are made of."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from gateloop_transformer.pictures import empty_figure, save_png

# A model has one color in all figures.
_COLORS = {
    "GateLoop": "tab:blue",
    "gateloop-transformer 0.2.5": "tab:purple",
    "Transformer (Llama: RoPE, SwiGLU)": "tab:orange",
    "Mamba (mambapy)": "tab:brown",
    "minGRU (minGRU-pytorch)": "tab:pink",
    "nn.LSTM": "tab:green",
    "nn.GRU": "tab:olive",
}
_CARRIED = "tab:cyan"


def color_of(name: str) -> str:
    """Of a model, which may be followed by its depth and by ", states carried".

    >>> color_of("nn.LSTM, 3 layers")
    'tab:green'
    """
    if name.endswith(", states carried"):
        return _CARRIED
    return next((color for model, color in _COLORS.items() if name.startswith(model)), "tab:gray")


def draw_losses(tables: dict[str, dict[str, list[float]]], target: Path) -> None:
    """A panel a table: bits per byte of each model, all seeds, the best on top.

    Args:
        tables: by title, bits per byte by the model's name.
        target: the PNG to write.
    """
    figure = empty_figure(9, 0.9 + sum(0.9 + 0.3 * len(found) for found in tables.values()))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=[2 + len(each) for each in tables.values()])
    for axes, (title, found) in zip(panels[:, 0], tables.items(), strict=True):
        order = sorted(found, key=lambda name: -statistics.fmean(found[name]))
        for place, name in enumerate(order):
            mean = statistics.fmean(found[name])
            color = color_of(name)
            axes.plot(found[name], [place] * len(found[name]), "o", color=color, alpha=0.5, markersize=5)
            axes.plot([mean], [place], "|", color=color, markersize=16, markeredgewidth=2)
            axes.annotate(f"{mean:.3f}", (max(found[name]), place), (8, -3), textcoords="offset points", fontsize=8)
        axes.set_yticks(range(len(order)), order, fontsize=9)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.margins(x=0.08)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.3, axis="x")
    panels[-1, 0].set_xlabel("bits per byte of held-out text (less is better); dots: seeds, bar: their mean")
    save_png(figure, target)


def draw_windows(found: dict[str, dict[int, float]], context: int, target: Path) -> None:
    """Bits per byte of one text against the size of the windows that it is read in.

    Args:
        found: by the model's name, bits per byte by tokens of a window.
        context: tokens of a window in training: marked.
        target: the PNG to write.
    """
    figure = empty_figure(7.5, 4.2)
    axes: Any = figure.subplots()
    for name, losses in found.items():
        axes.plot(list(losses), list(losses.values()), "o-", color=color_of(name), label=name)
    # What fails beyond its context would press all others together.
    best = min(min(losses.values()) for losses in found.values())
    most = max(loss for losses in found.values() for size, loss in losses.items() if size <= context)
    axes.set_ylim(best - 0.05, most + 0.05)
    axes.axvline(context, color="tab:gray", linestyle="--", label="window in training")
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens of a window, each read from an empty state", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_png(figure, target)


def draw_tasks(rows: list[dict[str, Any]], target: Path) -> None:
    """A panel a task: the mean accuracy of each kind of gate, by span where the task has spans, else by length.

    Args:
        rows: of `gateloop tasks --json`, with "name" and "kind".
        target: the PNG to write.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    names = [name for name in names if len(_scores([row for row in rows if row["name"] == name])) > 1]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    columns = 3
    lines = math.ceil(len(names) / columns)
    figure = empty_figure(12, 3.1 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        own = [row for row in rows if row["name"] == name]
        for n, kind in enumerate(kinds):
            if found := [row for row in own if row["kind"] == kind]:
                scores = _scores(found)
                axes.plot(list(scores), list(scores.values()), "o-", color=f"C{n}", markersize=4, alpha=0.8, label=kind)
        axes.axhline(own[0]["chance"], color="tab:gray", linestyle=":")
        if "accuracy_by_span" not in own[0]:
            axes.axvline(own[0]["trained_lengths"][1], color="tab:gray", linestyle="--", linewidth=0.8)
        axes.set(xscale="log", ylim=(-0.03, 1.03), title=name)
        axes.set_xlabel("span in steps" if "accuracy_by_span" in own[0] else "length in tokens", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.axis("off")
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    save_png(figure, target)


def _scores(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Mean accuracy by span or, without spans, by length."""
    which = "accuracy_by_span" if "accuracy_by_span" in rows[0] else "accuracy_by_length"
    return {
        int(key.split("-")[0]): statistics.fmean(row[which][key] for row in rows if key in row[which])
        for key in rows[0][which]
    }
