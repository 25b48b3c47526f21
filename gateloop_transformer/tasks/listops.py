"""Nested ListOps: the value of a nested expression is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gateloop_transformer.configuration import option
from gateloop_transformer.tasks.task import NONE, Batch, Task, at_least

# Tokens are the digits, then these operators, then the closing bracket, then padding.
OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE, PAD = 14, 15


@dataclass
class Node:
    """An expression: an operator (its index in `OPERATORS`) applied to digits and expressions."""

    operator: int
    arguments: list[Any]
    depth: int

    def tokens(self) -> list[int]:
        """Write the expression as tokens."""
        inner = [token for each in self.arguments for token in (each.tokens() if isinstance(each, Node) else [each])]
        return [10 + self.operator, *inner, CLOSE]

    def value(self) -> int:
        """Compute the value, a digit; MED is the lower of two middle values, SM the sum modulo 10."""
        values = sorted(each.value() if isinstance(each, Node) else each for each in self.arguments)
        return int((values[0], values[-1], values[(len(values) - 1) // 2], sum(values) % 10)[self.operator])


@dataclass(frozen=True)
class ListOps(Task):
    """The value of nested lists: [MAX 2 9 [MIN 4 7] 0] is 9.

    Tokens: the digits, [MIN, [MAX, [MED, [SM (sum modulo 10), ], padding. The size of an expression in tokens is drawn
    uniformly from half of `length` (rounded up) to `length`; padding comes before it; its value is asked at its
    last bracket. It grows from [op d d] by turning a digit into such a list or by adding a digit to a list, each as
    likely, at a random place where `depth` and `arguments` admit it, as long as the size does.

    Source: Nangia, Bowman, ListOps (2018); Tay et al., Long Range Arena (2021), there with 500 to 2,000 tokens, 10
    arguments and depth 10.
    """

    name: ClassVar[str] = "listops"
    summary: ClassVar[str] = "value of nested lists of MIN, MAX, MED and sum modulo 10"
    least: ClassVar[int] = 4
    trained: ClassVar[int] = 64
    tested: ClassVar[tuple[int, ...]] = (16, 32, 64, 128)
    settings: ClassVar[dict[str, Any]] = {"depth": 3}
    arguments: int = option(5, "the largest number of arguments of a list")
    nesting: int = option(4, "how many lists are inside one another at most")

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        at_least(self.name, 2, arguments=self.arguments)
        at_least(self.name, 1, nesting=self.nesting)

    @property
    def vocabulary(self) -> int:
        """The digits, the operators, the bracket and the padding."""
        return PAD + 1

    @property
    def answers(self) -> int:
        """The digits."""
        return 10

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw sequences of `length` tokens, padding included."""
        self.check(rows, length)
        inputs = np.full((rows, length), PAD)
        targets = np.full((rows, length), NONE)
        for row in range(rows):
            size = int(rng.integers(max(4, (length + 1) // 2), length + 1))
            expression = self.expression(rng, size)
            tokens = expression.tokens()
            inputs[row, length - len(tokens) :] = tokens
            targets[row, -1] = expression.value()
        return Batch(inputs, targets)

    def expression(self, rng: np.random.Generator, size: int) -> Node:
        """Draw an expression of `size` tokens, or of fewer where nothing more fits."""
        root = self._list(rng, 1)
        nodes, length = [root], 4
        while length < size:
            nested = rng.random() < 0.5 and size - length >= 3
            fitting = [node for node in nodes if self._admits(node, nested)]
            if not fitting:
                nested = not nested
                fitting = [node for node in nodes if self._admits(node, nested)]
                if not fitting or (nested and size - length < 3):
                    break
            node = fitting[int(rng.integers(len(fitting)))]
            if nested:
                digits = [place for place, each in enumerate(node.arguments) if not isinstance(each, Node)]
                inner = self._list(rng, node.depth + 1)
                node.arguments[digits[int(rng.integers(len(digits)))]] = inner
                nodes.append(inner)
            else:
                node.arguments.insert(int(rng.integers(len(node.arguments) + 1)), int(rng.integers(10)))
            length += 3 if nested else 1
        return root

    def _list(self, rng: np.random.Generator, depth: int) -> Node:
        return Node(int(rng.integers(len(OPERATORS))), rng.integers(0, 10, 2).tolist(), depth)

    def _admits(self, node: Node, nested: bool) -> bool:
        """Tell whether a node has room for a list in place of a digit (`nested`), or for a further digit."""
        if not nested:
            return len(node.arguments) < self.arguments
        return node.depth < self.nesting and not all(isinstance(each, Node) for each in node.arguments)
