"""Tasks of state tracking: a finite automaton reads symbols, and its state is asked after each.

Sequences begin with marks, at which nothing is asked. A gate loop outputs the real part of its state, the cosine of an
angle that it turns: it tells two angles of one cosine apart by what a second mark, written at another angle, left in
the state. Where no two angles have one cosine, as in parity, a second mark only blurs the first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from gateloop_transformer.configuration import option
from gateloop_transformer.tasks.task import NONE, Batch, Ids, Task, at_least

# Angles stay exact far beyond the lengths of training if one head of long memory is all that works (the weight decay),
# the size of its output is seen (no norm), and no answer is ever sure (the label smoothing).
EXACT: dict[str, Any] = {
    "dim": 32,
    "depth": 1,
    "head_norm": False,
    "conv_size": 0,
    "max_memory": 1000000.0,
    "min_memory": 30000.0,
    "phase_spread": 3.0,
    "gate_lr": 0.1,
    "weight_decay": 2.0,
    "smoothing": 0.1,
}
# A layer for each of the machines that are read one after the other: the term, then the sum.
STACKED: dict[str, Any] = {
    "gate_loop_heads": 16,
    "max_memory": 10000.0,
    "phase_spread": 1.0,
    "frac_gradient_state_transition": 1.0,
    "tokens": 700,
    "steps": 7500,
    "decay": 0.4,
    "weight_decay": 0.6,
    "smoothing": 0.05,
}


def marked(symbols: Ids, states: Ids, first_mark: int, marks: int = 2) -> Batch:
    """Put `marks` tokens, numbered from `first_mark` on, before each sequence; nothing is asked at them."""
    first = np.tile(np.arange(first_mark, first_mark + marks), (len(symbols), 1))
    return Batch(np.concatenate([first, symbols], 1), np.concatenate([np.full_like(first, NONE), states], 1))


@dataclass(frozen=True)
class Counting(Task):
    """The number of ones so far, modulo `modulus`.

    Tokens: 0, 1 (each as likely), then the marks. The answer is asked after every symbol.

    Source: Grazzi et al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (2025).
    """

    name: ClassVar[str] = "counting"
    summary: ClassVar[str] = "ones so far, modulo --modulus"
    settings: ClassVar[dict[str, Any]] = EXACT
    modulus: int = option(3, "what is counted modulo")
    marks: int = option(2, "tokens that begin a sequence, each of its own")

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        at_least(self.name, 2, modulus=self.modulus)
        at_least(self.name, 1, marks=self.marks)

    @property
    def vocabulary(self) -> int:
        """The symbols, the answers and the marks; answers are tokens so that the output needs no size of its own."""
        return max(2 + self.marks, self.modulus)

    @property
    def answers(self) -> int:
        """The numbers 0 to modulus - 1."""
        return self.modulus

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` - `marks` symbols after the marks."""
        self.check(rows, length)
        symbols = rng.integers(0, 2, (rows, length - self.marks))
        return marked(symbols, symbols.cumsum(1) % self.modulus, 2, self.marks)

    @property
    def shortest(self) -> int:
        """The length of one symbol after the marks."""
        return self.marks + 1


@dataclass(frozen=True)
class Parity(Counting):
    """Whether the number of ones so far is odd: counting modulo 2."""

    name: ClassVar[str] = "parity"
    summary: ClassVar[str] = "whether the number of ones so far is odd"
    modulus: int = field(default=2, init=False)
    marks: int = option(1, "tokens that begin a sequence, each of its own")


@dataclass(frozen=True)
class ModularArithmetic(Task):
    """The value of an expression without brackets, modulo `modulus`: 2 + 3 * 4 - 1, products first.

    Tokens: the digits 0 to modulus - 1, then +, -, *, then the two marks. Digits and operators take turns, all as
    likely. After every digit the value of the expression up to there is asked, after an operator nothing.

    Source: Delétang et al., Neural Networks and the Chomsky Hierarchy (2023), "Modular Arithmetic (Simple)".
    """

    least: ClassVar[int] = 3
    name: ClassVar[str] = "arithmetic"
    summary: ClassVar[str] = "value of digits with + - * and no brackets, modulo --modulus"
    settings: ClassVar[dict[str, Any]] = STACKED
    modulus: int = option(5, "what is calculated modulo")

    def __post_init__(self) -> None:
        """Refuse a modulus that is too small."""
        at_least(self.name, 2, modulus=self.modulus)

    @property
    def vocabulary(self) -> int:
        """The digits, the operators and the marks."""
        return self.modulus + 5

    @property
    def answers(self) -> int:
        """The numbers 0 to modulus - 1."""
        return self.modulus

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` - 2 symbols after the marks; an even number of them ends with an operator."""
        self.check(rows, length)
        m, count = self.modulus, (length - 1) // 2
        digits = rng.integers(0, m, (rows, count))
        operators = rng.integers(0, 3, (rows, count))
        values = np.empty_like(digits)
        total, term = np.zeros(rows, dtype=np.int64), digits[:, 0]
        values[:, 0] = term
        for n in range(1, count):
            operator, digit = operators[:, n - 1], digits[:, n]
            times = operator == 2
            total = np.where(times, total, (total + term) % m)
            term = np.where(times, term * digit, np.where(operator == 1, -digit, digit)) % m
            values[:, n] = (total + term) % m
        symbols = np.stack([digits, m + operators], 2).reshape(rows, -1)[:, : length - 2]
        asked = np.stack([values, np.full_like(values, NONE)], 2).reshape(rows, -1)[:, : length - 2]
        return marked(symbols, asked, m + 3)


# All orders of five things; the state is the number of one of them.
_ORDERS = np.array(list(itertools.permutations(range(5))))
_NUMBERS = {tuple(order): number for number, order in enumerate(_ORDERS.tolist())}
# [a, b]: the order a, with its places filled in the order b: first b, then a.
_PRODUCTS = np.array([[_NUMBERS[tuple(after[before])] for before in _ORDERS] for after in _ORDERS])
_SWAP, _CYCLE = _NUMBERS[1, 0, 2, 3, 4], _NUMBERS[1, 2, 3, 4, 0]


@dataclass(frozen=True)
class SymmetricGroup(Task):
    """The product of permutations of five things (the group S5), one after the other: the negative control.

    No stack of a fixed number of diagonal linear recurrences solves it at every length, whatever their gates (S5 is not
    solvable, and its word problem is complete for NC¹). Tokens: the 120 permutations, in the order of
    `itertools.permutations`, then the two marks. Inputs are drawn from `generators`; the product so far is asked after
    each.

    Source: Merrill, Petty, Sabharwal, The Illusion of State in State-Space Models (2024).
    """

    least: ClassVar[int] = 3
    name: ClassVar[str] = "s5"
    summary: ClassVar[str] = "product of permutations of five things: not to be solved"
    tested: ClassVar[tuple[int, ...]] = (40, 160, 256)
    settings: ClassVar[dict[str, Any]] = STACKED
    generators: str = option(
        "two", "which permutations are read: a swap and a cycle, which make all others, or all", ("two", "all")
    )

    @property
    def vocabulary(self) -> int:
        """The permutations and the marks."""
        return 122

    @property
    def answers(self) -> int:
        """All permutations."""
        return 120

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` - 2 permutations after the marks."""
        self.check(rows, length)
        drawn = np.array([_SWAP, _CYCLE]) if self.generators == "two" else np.arange(120)
        symbols = drawn[rng.integers(0, len(drawn), (rows, length - 2))]
        states = np.empty_like(symbols)
        state = np.zeros(rows, dtype=np.int64)
        for step in range(length - 2):
            state = _PRODUCTS[symbols[:, step], state]
            states[:, step] = state
        return marked(symbols, states, 120)
