"""A picture of how often a model is right, by length and by span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gateloop_transformer.pictures import empty_figure, save_png


def draw_accuracy(results: list[dict[str, Any]], target: Path) -> None:
    """Accuracy against length, and against span where there are spans; dotted: what a constant answer scores.

    Args:
        results: objects as `gateloop tasks --json` prints, of one task.
        target: the PNG to write, whole or not at all.

    Raises:
        ValueError: matplotlib is not installed.
    """
    spans = any("accuracy_by_span" in result for result in results)
    figure = empty_figure(11 if spans else 6, 4.2)
    panels = figure.subplots(1, 2 if spans else 1, squeeze=False)[0]
    for result in results:
        label = _label(result)
        (line,) = panels[0].plot(*_points(result["accuracy_by_length"]), "o-", label=label)
        panels[0].plot(*_points(result["commonest_by_length"]), ":", color=line.get_color())
        if spans:
            panels[1].plot(*_points(result.get("accuracy_by_span", {})), "o-", color=line.get_color(), label=label)
    panels[0].plot([], [], ":", color="grey", label="the commonest answer")
    longest = max(result["trained_lengths"][1] for result in results)
    panels[0].axvline(longest, color="grey", linewidth=0.8)
    panels[0].annotate(" trained up to here", (longest, 1.03), color="grey", fontsize="small")
    for axes, what in zip(panels, ("length in tokens", "span in steps (from the start of the bucket)"), strict=False):
        axes.set(xlabel=what, xscale="log", ylim=(-0.03, 1.09), ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize="small")
    figure.suptitle(results[0]["task"])
    save_png(figure, target)


def _points(scores: dict[str, float]) -> tuple[list[int], list[float]]:
    """Lengths or spans, and accuracies."""
    return [int(key.split("-")[0]) for key in scores], list(scores.values())


def _label(result: dict[str, Any]) -> str:
    """The model and what its gates are."""
    model = result["options"]["model"]
    words = [result["model"]] if result["gate"] is None else [result["gate"], "real" if model["ablate_complex"] else ""]
    words += ["all gates 1" if model["ablate_state_transition"] else "", "fixed" if model.get("fixed_gates") else ""]
    return f"{' '.join(filter(None, words))}, {result['parameters']:,} parameters, seed {result['seed']}"
