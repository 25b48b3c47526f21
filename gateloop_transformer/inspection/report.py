"""Figures of a trace, for JSON and for the page."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gateloop_transformer.data.tokenizer import Tokenizer
from gateloop_transformer.evaluation.positions import Costs, Spread, same_tokens
from gateloop_transformer.evaluation.spans import distances_to_same, doubling_spans, spans_of
from gateloop_transformer.inspection.characters import classes_of
from gateloop_transformer.inspection.measures import (
    QUANTILES,
    by_class,
    finite,
    half_lives,
    heads_by_half_life,
    histogram_of_half_lives,
    quantiles,
)
from gateloop_transformer.inspection.trace import LayerGates, Trace


class Report(NamedTuple):
    """A trace with all that is found in it.

    trace: of T tokens. pieces: the bytes of each. figures: what is found, as plain values for JSON; half-lives that
    are infinite are "∞" there.
    """

    trace: Trace
    pieces: list[bytes]
    figures: dict[str, Any]


def report(trace: Trace, tokenizer: Tokenizer) -> Report:
    """Compute the figures of a trace."""
    pieces = [tokenizer.pieces[n] for n in trace.ids.tolist()]
    spread = _spread(trace, tokenizer)
    whole = Costs(*(field.sum(keepdims=True) for field in spread.positions)).row(0)
    classes = classes_of(pieces)
    figures = {
        "tokens": len(pieces),
        "bytes": sum(map(len, pieces)),
        **{name: whole[name] for name in ("loss", "bits_per_byte", "accuracy")},
        "layers": [_layer(layer, classes) for layer in trace.layers],
        "by_position": spread.by_position(),
        "by_distance": spread.by_distance(),
        "same_tokens": spread.same,
    }
    return Report(trace, pieces, figures)


def _spread(trace: Trace, tokenizer: Tokenizer) -> Spread:
    """Costs by position and by how long ago the same tokens came before."""
    last, same = len(trace.ids) - 1, same_tokens(tokenizer)
    spans = doubling_spans(last)
    found = Spread(spans, Costs.none(len(spans)), Costs.none(len(spans) + 1), same)
    distances = distances_to_same(trace.ids, same)
    again = (distances > 0) & (trace.ids[np.arange(last + 1) - distances] == trace.ids)
    costs = [field[1:] for field in (trace.nats, tokenizer.lengths[trace.ids], trace.right, again)]
    found.positions.add(spans_of(np.arange(1, last + 1), spans), *costs)
    found.distances.add(np.where(distances > 0, spans_of(distances, spans), len(spans))[1:], *costs)
    return found


def _layer(layer: LayerGates, classes: dict[str, Any]) -> dict[str, Any]:
    """Figures of one layer; of one without gates there are but its name and a note."""
    figures: dict[str, Any] = {"layer": layer.layer, "mixer": layer.mixer, "note": layer.note}
    if layer.gates is None:
        return {**figures, "heads": 0}
    lives = half_lives(layer.gates)
    medians = np.quantile(lives, 0.5, axis=0, method="nearest")
    order = heads_by_half_life(layer.gates)
    return {
        **figures,
        "heads": layer.gates.shape[1],
        "half_life": {f"{at:.0%}": finite(life) for at, life in zip(QUANTILES, quantiles(lives), strict=True)},
        "by_class": {name: found.to_json() for name, found in by_class(layer.gates, classes).items()},
        "half_lives": histogram_of_half_lives(layer.gates),
        "heads_by_half_life": [{"head": int(head) + 1, "half_life": finite(medians[head])} for head in order],
    }
