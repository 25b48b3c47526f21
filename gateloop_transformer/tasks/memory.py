"""Tasks of memory: something must be held while other things pass by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gateloop_transformer.configuration import option
from gateloop_transformer.tasks.task import NONE, Batch, Task, at_least


@dataclass(frozen=True)
class MemoryHorizon(Task):
    """Hold one value for a span of any size, and forget it when told to.

    Tokens: 0 is the answer "nothing"; 1 to values are the values; then store, recall, forget. A sequence is episodes,
    one after the other. An episode is: store; a value, drawn uniformly; s - 1 distractors; recall. At recall, and
    nowhere else, the value is asked. Distractors are values drawn uniformly: only the store before a value tells that
    it counts. The span s, steps from the value to its recall, is drawn log-uniformly from 1 to what room there is in
    the sequence (and to `max_span`). With probability `forgets`, in a span of 2 or more, one distractor (each as
    likely) is the token forget instead: then "nothing" is asked, and the span of that answer is the steps from forget
    to recall. A new store replaces what was stored. Where no episode fits (fewer than 3 tokens), distractors fill the
    end.
    """

    name: ClassVar[str] = "horizon"
    summary: ClassVar[str] = "hold a value over spans of any size, among distractors; accuracy by span"
    least: ClassVar[int] = 3
    trained: ClassVar[int] = 256
    tested: ClassVar[tuple[int, ...]] = (64, 256, 1024, 4096)
    settings: ClassVar[dict[str, Any]] = {"depth": 1, "steps": 2500, "solved": 0.995}
    values: int = option(8, "how many values there are")
    max_span: int = option(1000000, "the longest span that is drawn, in steps")
    forgets: float = option(0.25, "probability that an episode has a token that says to forget")

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        at_least(self.name, 1, values=self.values, max_span=self.max_span)
        if not 0 <= self.forgets <= 1:
            raise ValueError(f"{self.name}: forgets must be in [0, 1], not {self.forgets}")

    @property
    def vocabulary(self) -> int:
        """The answer "nothing", the values and the three marks."""
        return self.values + 4

    @property
    def answers(self) -> int:
        """The answer "nothing" and the values."""
        return self.values + 1

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw episodes until each sequence is full."""
        self.check(rows, length)
        inputs = rng.integers(1, self.values + 1, (rows, length))
        targets, spans = np.full_like(inputs, NONE), np.zeros_like(inputs)
        for row in range(rows):
            start = 0
            while length - start >= 3:
                start = self._episode(rng, inputs[row], targets[row], spans[row], start)
        return Batch(inputs, targets, spans)

    def _episode(self, rng: np.random.Generator, inputs: Any, targets: Any, spans: Any, start: int) -> int:
        """Write an episode over the distractors from `start` on; returns where the next one starts."""
        store, recall, forget = (self.values + n for n in (1, 2, 3))
        room = min(self.max_span, len(inputs) - start - 2)
        span = min(room, int(np.exp(rng.uniform(0, np.log(room + 1)))))
        inputs[start] = store
        end = start + 1 + span
        inputs[end], targets[end], spans[end] = recall, inputs[start + 1], span
        if span >= 2 and rng.random() < self.forgets:
            place = int(rng.integers(start + 2, end))
            inputs[place], targets[end], spans[end] = forget, 0, end - place
        return end + 1


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Repeat the few data tokens that are scattered among noise, in their order.

    Tokens: 0 to values - 1 are data, then noise, then "now". The last `items` tokens are "now", at which the data are
    asked in turn; before them `items` data tokens stand at random places, noise elsewhere. The span of an answer is
    the steps from its token to where it is asked.

    Source: Gu, Dao, Mamba (2023), section 4.1.1, there with length 4,096 and 16 items.
    """

    name: ClassVar[str] = "copying"
    summary: ClassVar[str] = "repeat data scattered among noise (selective copying); accuracy by span"
    trained: ClassVar[int] = 128
    tested: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)
    settings: ClassVar[dict[str, Any]] = {"steps": 2000}
    values: int = option(8, "how many different data tokens there are")
    items: int = option(8, "how many data tokens a sequence has")

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        at_least(self.name, 1, values=self.values, items=self.items)

    @property
    def vocabulary(self) -> int:
        """The data tokens, noise and "now"."""
        return self.values + 2

    @property
    def answers(self) -> int:
        """The data tokens."""
        return self.values

    @property
    def shortest(self) -> int:
        """The length of a sequence without noise."""
        return 2 * self.items

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` tokens, of which the last `items` are "now"."""
        self.check(rows, length)
        body = length - self.items
        inputs = np.full((rows, length), self.values)
        inputs[:, body:] = self.values + 1
        places = np.sort(rng.permuted(np.tile(np.arange(body), (rows, 1)), axis=1)[:, : self.items], 1)
        data = rng.integers(0, self.values, (rows, self.items))
        np.put_along_axis(inputs, places, data, 1)
        targets, spans = np.full_like(inputs, NONE), np.zeros_like(inputs)
        targets[:, body:] = data
        spans[:, body:] = np.arange(body, length) - places
        return Batch(inputs, targets, spans)
