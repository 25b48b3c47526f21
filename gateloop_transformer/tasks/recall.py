"""Tasks of association: what followed this token before?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gateloop_transformer.configuration import option
from gateloop_transformer.tasks.task import NONE, Batch, Task, at_least


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Pairs of key and value, then some of the keys again: each time its value is asked (MQAR).

    Tokens: 0 to values - 1 are values, then the keys, then the filler. A sequence begins with `pairs` pairs, whose keys
    all differ. Each key comes once more, at an even step of the rest, fillers elsewhere; the gap g (in pairs of steps)
    from the end of the pairs to it has a probability proportional to g^(power - 1), without replacement: queries are
    mostly near. The value is asked where the key comes. The span of an answer is the steps from its value.

    Source: Arora et al., Zoology (2023), appendix on MQAR; there with vocabularies of 8,192.
    """

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "values of keys seen before (multi-query associative recall); accuracy by span"
    trained: ClassVar[int] = 64
    tested: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)
    settings: ClassVar[dict[str, Any]] = {"steps": 2000}
    pairs: int = option(8, "pairs of key and value in a sequence")
    keys: int = option(32, "how many keys there are")
    values: int = option(32, "how many values there are")
    power: float = option(0.1, "exponent of the gaps before queries: small is near, 1 is anywhere")

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        at_least(self.name, 1, pairs=self.pairs, values=self.values)
        at_least(self.name, self.pairs, keys=self.keys)
        if not 0 < self.power < float("inf"):
            raise ValueError(f"{self.name}: power must be finite and above 0, not {self.power}")

    @property
    def vocabulary(self) -> int:
        """The values, the keys and the filler."""
        return self.values + self.keys + 1

    @property
    def answers(self) -> int:
        """The values."""
        return self.values

    @property
    def shortest(self) -> int:
        """The length of the pairs, and of a query every other step."""
        return 4 * self.pairs

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` tokens, of which the first 2 · `pairs` are the pairs."""
        self.check(rows, length)
        start = 2 * self.pairs
        inputs = np.full((rows, length), self.values + self.keys)
        # Taking the first of a random order draws without replacement.
        keys = rng.random((rows, self.keys)).argsort(1)[:, : self.pairs] + self.values
        values = rng.integers(0, self.values, (rows, self.pairs))
        inputs[:, 0:start:2], inputs[:, 1:start:2] = keys, values
        gaps = np.arange(1, (length - start) // 2 + 1)
        # Taking the smallest of exponential times with rates p draws without replacement with probabilities p.
        times = rng.exponential(size=(rows, len(gaps))) / gaps ** (self.power - 1.0)
        places = start + 2 * times.argsort(1)[:, : self.pairs]
        targets, spans = np.full_like(inputs, NONE), np.zeros_like(inputs)
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        np.put_along_axis(spans, places, places - np.arange(1, start, 2), 1)
        return Batch(inputs, targets, spans)


@dataclass(frozen=True)
class InductionHeads(Task):
    """What followed the special token when it came before?

    Tokens: 0 to values - 1, then the special one. A sequence is values drawn uniformly; the special token stands at one
    random place of the first `length` - 2 and at the end, where the token that followed it is asked. The span is
    the steps from that token.

    Source: Gu, Dao, Mamba (2023), section 4.1.2: trained at length 256, tested up to 2^20.
    """

    name: ClassVar[str] = "induction"
    summary: ClassVar[str] = "what followed the special token before (induction heads); accuracy by span"
    least: ClassVar[int] = 3
    trained: ClassVar[int] = 256
    tested: ClassVar[tuple[int, ...]] = (64, 256, 1024, 4096, 16384)
    values: int = option(16, "how many ordinary tokens there are")

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        at_least(self.name, 1, values=self.values)

    @property
    def vocabulary(self) -> int:
        """The ordinary tokens and the special one."""
        return self.values + 1

    @property
    def answers(self) -> int:
        """The ordinary tokens."""
        return self.values

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` tokens."""
        self.check(rows, length)
        inputs = rng.integers(0, self.values, (rows, length))
        targets, spans = np.full_like(inputs, NONE), np.zeros_like(inputs)
        places = rng.integers(0, length - 2, rows)
        each = np.arange(rows)
        inputs[each, places] = inputs[:, -1] = self.values
        targets[:, -1], spans[:, -1] = inputs[each, places + 1], length - 2 - places
        return Batch(inputs, targets, spans)
