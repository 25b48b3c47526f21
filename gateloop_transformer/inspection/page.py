"""One page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from gateloop_transformer.inspection.measures import (
    CELLS,
    Gates,
    half_lives,
    heads_by_half_life,
    phases,
    quantiles,
    some_of,
    spectrum,
)
from gateloop_transformer.inspection.report import Report

# Tokens that a page shows at most.
MOST_TOKENS = 4000
# Gates that a page holds at most, three bytes each.
_GATES = 900_000
# Half-lives are kept as 16-bit steps of their logarithm, between these powers of 2; the last code is for infinite ones.
_LOW, _HIGH, _INFINITE = -8, 56, 65535


def page(report: Report, title: str, notes: list[str]) -> str:
    """The page.

    Args:
        report: of at most `MOST_TOKENS` tokens.
        title: what was inspected.
        notes: what the reader is to know, shown at the top.

    Raises:
        ValueError: there are too many tokens.
    """
    if len(report.pieces) > MOST_TOKENS:
        raise ValueError(f"a page shows at most {MOST_TOKENS:,} tokens, not {len(report.pieces):,}")
    values = {**report.figures, "title": title, "notes": notes, "cells": CELLS, **text_of(report.pieces)}
    values["nats"] = [None, *report.trace.nats[1:].round(3).tolist()]
    values["right"] = report.trace.right.astype(int).tolist()
    values["scale"] = [_LOW, _HIGH]
    room = _heads_shown(report)
    values["layers"] = [
        figures if layer.gates is None else {**figures, **_gates(layer.gates, room)}
        for figures, layer in zip(report.figures["layers"], report.trace.layers, strict=True)
    ]
    content = _file("page.html")
    for place, part in (
        ("/*STYLE*/", _file("page.css")),
        ("/*FIGURES*/", _file("page.figures.js")),
        ("/*SCRIPT*/", _file("page.js")),
        ("<!--TITLE-->", html.escape(title)),
        ("<!--DATA-->", embedded(values)),
    ):
        content = content.replace(place, part)
    return content


def embedded(values: Any) -> str:
    r"""JSON that may stand in a script element: plain ASCII without <, > and &.

    >>> print(embedded("</script>"))
    "\u003c/script\u003e"
    """
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def text_of(pieces: list[bytes]) -> dict[str, Any]:
    """Tokens for the page.

    Returns:
        "text": each token's text, or, where its bytes are none, a list of these in hexadecimal. "joined": [first, last,
        text] for tokens that are text only together.
    """
    shown = [_text(piece) for piece in pieces]
    texts = [[piece.hex(" ").upper()] if text is None else text for piece, text in zip(pieces, shown, strict=True)]
    joined: list[tuple[int, int, str]] = []
    n = 0
    while n < len(pieces):
        last = n
        if shown[n] is None:
            last = next((m for m in range(n + 1, min(n + 4, len(pieces))) if _text(b"".join(pieces[n : m + 1]))), n)
            if last > n:
                joined.append((n, last, b"".join(pieces[n : last + 1]).decode()))
        n = last + 1
    return {"text": texts, "joined": joined}


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _heads_shown(report: Report) -> int:
    """The number of heads of a layer that the page has room for."""
    gated = sum(layer.gates is not None for layer in report.trace.layers)
    # The quantiles need as much as four heads.
    return max(2, _GATES // max(1, gated * len(report.pieces)) - 4)


def _gates(gates: Gates, room: int) -> dict[str, Any]:
    """A layer's gates, of `room` heads at most: the heads' numbers, and arrays (heads, T)."""
    shown = some_of(heads_by_half_life(gates), room)
    lives = half_lives(gates)
    turns = np.round((phases(gates[:, shown]) + np.pi) / (2 * np.pi) * 256).astype(int) % 256
    return {
        "shown": (shown + 1).tolist(),
        "life": _packed(half_life_codes(lives[:, shown].T)),
        "phase": _packed(turns.T.astype("u1")),
        "quantiles": _packed(half_life_codes(quantiles(lives, axis=1))),
        "spectrum": _packed(np.minimum(spectrum(gates), 2**32 - 1).astype("<u4")),
    }


def half_life_codes(lives: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Half-lives as steps of their logarithm, of 1/1024 octave."""
    finite = np.clip(np.log2(np.where(np.isinf(lives), 1.0, lives)), _LOW, _HIGH)
    codes = np.round((finite - _LOW) / (_HIGH - _LOW) * (_INFINITE - 1))
    return np.where(np.isinf(lives), _INFINITE, codes).astype("<u2")


def _packed(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _file(name: str) -> str:
    return resources.files("gateloop_transformer.inspection").joinpath(name).read_text(encoding="utf-8")
