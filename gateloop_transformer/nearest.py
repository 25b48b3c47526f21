"""Finds the word that a mistyped one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` was probably meant to be; hyphens before a flag do not count.

    >>> nearest("--stpes", ["--seed", "--steps"]), nearest("foo", ["bar"])
    ('--steps', None)
    """
    plain = {each.lstrip("-").lower(): each for each in words}
    near = difflib.get_close_matches(word.lstrip("-").lower(), plain, 1)
    return plain[near[0]] if near else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A hint to append to an error about an unknown word: the nearest known one, or nothing."""
    near = nearest(word, words)
    return "" if near is None else f"; did you mean {near!r}?"
