"""Spans: positions and distances in buckets that double, and how far back the same tokens came before."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


class Span(NamedTuple):
    """The whole numbers from `first` to `last`, both included."""

    first: int
    last: int


def doubling_spans(last: int, anchor: int = 1) -> list[Span]:
    """1 to `last` in spans, each about twice as long as the one before; one of them ends at `anchor`.

    >>> doubling_spans(10, 4)
    [Span(first=1, last=1), Span(first=2, last=2), Span(first=3, last=4), Span(first=5, last=8), Span(first=9, last=10)]
    """
    ends = {last}
    end = float(anchor)
    while end >= 1:
        ends.add(round(end))
        end /= 2
    end = anchor
    while end < last:
        ends.add(round(end))
        end *= 2
    first, spans = 1, []
    for each in sorted(end for end in ends if 1 <= end <= last):
        spans.append(Span(first, each))
        first = each + 1
    return spans


def spans_of(values: npt.NDArray[Any], spans: list[Span]) -> Numbers:
    """The number of the span that each value lies in; values beyond the last span are in the last."""
    ends = np.array([span.last for span in spans], dtype=np.int64)
    return np.minimum(np.searchsorted(ends, values), len(spans) - 1)


def distances_to_same(ids: npt.NDArray[Any], count: int) -> Numbers:
    """For each token, how many tokens ago the same `count` tokens stood before one, at the latest; 0: never.

    Args:
        ids: (T,) tokens.
        count: at least 1.

    Returns:
        (T,); ids[t - distance] is what followed then.

    >>> import numpy as np
    >>> distances_to_same(np.frombuffer(b"abcXabcY", np.uint8), 3)
    array([0, 0, 0, 0, 0, 0, 0, 4])
    """
    distances = np.zeros(len(ids), dtype=np.int64)
    if len(ids) <= count:
        return distances
    # Numbers that are the same where the tokens up to there are, one more token at a time.
    tokens = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    groups = tokens
    for _ in range(count - 1):
        pairs = groups[:-1] * (int(tokens.max()) + 1) + tokens[len(tokens) - len(groups) + 1 :]
        groups = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
    # The last is before no token.
    groups = groups[:-1]
    order = np.argsort(groups, kind="stable")
    same = groups[order[1:]] == groups[order[:-1]]
    distances[count + order[1:][same]] = (order[1:] - order[:-1])[same]
    return distances
