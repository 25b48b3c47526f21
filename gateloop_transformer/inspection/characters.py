"""Which tokens hold spaces, line starts, letters and the like."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# The classes in the order in which they are shown. A token belongs to every class that one of its bytes belongs to.
CLASSES = (
    "newline",
    "first of a line",
    "space",
    "first of a word",
    "letter",
    "digit",
    "punctuation",
    "other",
)
_NEWLINES = "\n\r\v\f\x85\u2028\u2029"


def classes_of(pieces: Sequence[bytes]) -> dict[str, npt.NDArray[np.bool_]]:
    """Find which tokens belong to which class.

    Args:
        pieces: the bytes of the T tokens of a text, in its order.

    Returns:
        Booleans (T,) for each of `CLASSES` that occurs.

    >>> {name: found.tolist() for name, found in classes_of([b"a", b" b", b"?"]).items() if name != "letter"}
    {'first of a line': [True, False, False], 'space': [False, True, False], \
'first of a word': [True, True, False], 'punctuation': [False, False, True]}
    """
    of_byte = _classes_of_bytes(b"".join(pieces))
    ends = np.cumsum([len(piece) for piece in pieces])
    owners = np.searchsorted(ends, np.arange(of_byte.shape[1]), side="right")
    found = {}
    for name, own in zip(CLASSES, of_byte, strict=True):
        if own.any():
            found[name] = np.bincount(owners[own], minlength=len(pieces)) > 0
    return found


def _classes_of_bytes(text: bytes) -> npt.NDArray[np.bool_]:
    """Booleans (classes, bytes): the bytes of a character have its classes; bytes that are not UTF-8 are "other"."""
    classes = np.zeros((len(CLASSES), len(text)), dtype=bool)
    place, before = 0, "\n"
    for character in text.decode("utf-8", "surrogateescape"):
        size = len(character.encode("utf-8", "surrogateescape"))
        kind = _kind(character)
        classes[CLASSES.index(kind), place : place + size] = True
        if kind != "newline" and before in _NEWLINES:
            classes[CLASSES.index("first of a line"), place : place + size] = True
        if kind == "letter" and _kind(before) != "letter":
            classes[CLASSES.index("first of a word"), place : place + size] = True
        place, before = place + size, character
    return classes


def _kind(character: str) -> str:
    """The one class of a character that does not depend on its neighbours."""
    if character in _NEWLINES:
        return "newline"
    if character.isspace():
        return "space"
    category = unicodedata.category(character)
    # A mark (M) is part of the letter before it.
    return {"L": "letter", "M": "letter", "N": "digit", "P": "punctuation", "S": "punctuation"}.get(
        category[0], "other"
    )
