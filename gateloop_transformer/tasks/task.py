"""What a task is: a vocabulary, batches drawn from a generator, and the settings that it is trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# Where nothing is asked: what `cross_entropy` passes over.
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

    name, summary: as the command line says them. least: the shortest sequences that it has. trained: the longest that
    are trained on by default, and `grows` whether training starts with shorter ones. tested: lengths that are tested
    by default. settings: of model and training where they are not the general defaults.
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
        """How many tokens there are."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """How many answers there are: a blind guess is right once in so many."""
        raise NotImplementedError

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences.

        Args:
            rng: decides everything; see `generator`.
            rows: number of sequences.
            length: of each in tokens, at least `shortest`.

        Raises:
            ValueError: the length is too small.
        """
        raise NotImplementedError

    def test_batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """As `batch`, of sequences that training never sees, where there is a fixed set of them."""
        return self.batch(rng, rows, length)

    @property
    def shortest(self) -> int:
        """The shortest length with these parameters."""
        return self.least

    def check(self, rows: int, length: int) -> None:
        """There are such batches.

        Raises:
            ValueError: there are not.
        """
        if rows < 1 or length < self.shortest:
            raise ValueError(
                f"{self.name}: a batch needs at least 1 row and a length of at least {self.shortest}, not {rows} rows "
                f"of length {length}"
            )


def generator(seed: int, *place: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the place (the number of a step, say) alone."""
    return np.random.default_rng([seed, *place])


def test_rows(rows: int, length: int) -> int:
    """Sequences in a test: fewer of those above 2,000 tokens, which take long."""
    return rows if length <= 2000 else min(rows, 64)


def at_least(name: str, smallest: int, **values: int) -> None:
    """All parameters of a task are large enough.

    Raises:
        ValueError: one is not.
    """
    for key, value in values.items():
        if value < smallest:
            raise ValueError(f"{name}: {key} must be at least {smallest}, not {value}")


def last_asked(targets: Ids) -> Ids:
    """(B,) the last step of each row at which something is asked.

    Raises:
        ValueError: there is a row without one.
    """
    asked = targets != NONE
    if not asked.any(1).all():
        raise ValueError("a row asks for nothing")
    steps: Ids = targets.shape[1] - 1 - asked[:, ::-1].argmax(1)
    return steps
