"""A picture of how often a model is right, by length and by span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gateloop_transformer.pictures import empty_figure, save_png


def draw_accuracy(result: dict[str, Any], target: Path) -> None:
    """Draw accuracy against length, and against span where there are spans; dotted is the score of a constant answer.

    Args:
        result: the object that `gateloop tasks --json` prints.
        target: the PNG to write, whole or not at all.

    Raises:
        ValueError: matplotlib is not installed.
    """
    panels = [("length in tokens", result["accuracy_by_length"])]
    if "accuracy_by_span" in result:
        panels.append(("span in steps (from the start of the bucket)", result["accuracy_by_span"]))
    figure = empty_figure(1 + 5 * len(panels), 4.2)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (what, scores) in zip(drawn, panels, strict=True):
        axes.plot(*_points(scores), "o-", color="tab:blue", label=_label(result))
        axes.set(xlabel=what, xscale="log", ylim=(-0.03, 1.09), ylabel="accuracy")
        axes.grid(alpha=0.3)
    drawn[0].plot(*_points(result["commonest_by_length"]), ":", color="tab:blue", label="the commonest answer")
    longest = result["trained_lengths"][1]
    drawn[0].axvline(longest, color="grey", linewidth=0.8)
    drawn[0].annotate(" trained up to here", (longest, 1.03), color="grey", fontsize="small")
    for axes in drawn:
        axes.legend(loc="lower left", fontsize="small")
    figure.suptitle(result["task"])
    save_png(figure, target)


def _points(scores: dict[str, float]) -> tuple[list[int], list[float]]:
    """The lengths or spans of points, and their accuracies."""
    return [int(key.split("-")[0]) for key in scores], list(scores.values())


def _label(result: dict[str, Any]) -> str:
    """The names of the model and of its kind of gate."""
    model = result["options"]["model"]
    words = [result["model"]] if result["gate"] is None else [result["gate"], "real" if model["ablate_complex"] else ""]
    words += ["all gates 1" if model["ablate_state_transition"] else "", "fixed" if model["fixed_gates"] else ""]
    return f"{' '.join(filter(None, words))}, {result['parameters']:,} parameters, seed {result['seed']}"
