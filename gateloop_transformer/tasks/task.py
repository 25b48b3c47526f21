"""What a task is: a vocabulary, batches drawn from a generator, and the settings that it is trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# The target where nothing is asked, which `cross_entropy` ignores.
NONE = -100


class Batch(NamedTuple):
    """Sequences and what is asked about them.

    inputs: (B, T), tokens. targets: (B, T), the answer that is asked at a step, `NONE` where none is. spans: (B, T),
    steps from what decides the answer to where it is asked, 0 where none is; None: the task has no spans.
    """

    inputs: Ids
    targets: Ids
    spans: Ids | None = None


@dataclass(frozen=True)
class Task:
    """A task; its fields are its parameters. Answers are the first `answers` tokens of the vocabulary.

    name, summary: shown by the command line. least: length of the shortest sequences. trained: length of the longest
    sequences to train on by default; grows: training starts with shorter ones. tested: lengths to test by default.
    settings: settings of model and training that differ from the general defaults.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    least: ClassVar[int] = 2
    trained: ClassVar[int] = 160
    grows: ClassVar[bool] = True
    tested: ClassVar[tuple[int, ...]] = (40, 160, 256, 1000, 10000)
    settings: ClassVar[dict[str, Any]] = {}

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """The number of answers, of which a blind guess picks one."""
        raise NotImplementedError

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences.

        Args:
            rng: decides everything; see `generator`.
            rows: number of sequences.
            length: tokens of each sequence, at least `shortest`.

        Raises:
            ValueError: the length is too small.
        """
        raise NotImplementedError

    def test_batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw a batch for a test; where the sequences are a fixed set, training never sees these."""
        return self.batch(rng, rows, length)

    @property
    def shortest(self) -> int:
        """The shortest length with these parameters."""
        return self.least

    def check(self, rows: int, length: int) -> None:
        """Check that the task has such batches.

        Raises:
            ValueError: it has not.
        """
        if rows < 1 or length < self.shortest:
            raise ValueError(
                f"{self.name}: a batch needs at least 1 row and a length of at least {self.shortest}, not {rows} rows "
                f"of length {length}"
            )


def generator(seed: int, *place: int) -> np.random.Generator:
    """A generator of random numbers that depend only on the seed and the place, such as the number of a step."""
    return np.random.default_rng([seed, *place])


def test_rows(rows: int, length: int) -> int:
    """The number of sequences in a test: fewer of those above 2,000 tokens, which take long."""
    return rows if length <= 2000 else min(rows, 64)


def at_least(name: str, smallest: int, **values: int) -> None:
    """Check that all parameters of a task are large enough.

    Raises:
        ValueError: one is not.
    """
    for key, value in values.items():
        if value < smallest:
            raise ValueError(f"{name}: {key} must be at least {smallest}, not {value}")


def last_asked(targets: Ids) -> Ids:
    """The last step of each row at which something is asked (B,).

    Raises:
        ValueError: there is a row without one.
    """
    asked = targets != NONE
    if not asked.any(1).all():
        raise ValueError("a row asks for nothing")
    steps: Ids = targets.shape[1] - 1 - asked[:, ::-1].argmax(1)
    return steps
