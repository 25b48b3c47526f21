"""What decoding needs of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from gateloop_transformer.layers.state import TransformerState


class Decoder(Protocol):
    """What generation needs of a model: `Transformer` has it."""

    num_tokens: int
    training: bool

    def __call__(
        self, ids: Tensor, *, state: TransformerState | None, return_state: bool, mask: Tensor | None = None
    ) -> Any:
        """(logits (B, T, num_tokens), state); steps of ids where a mask (B, T) is False do not exist."""

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode."""

    def modules(self) -> Iterator[Any]:
        """All modules, each with a flag `training`."""

    def check_vocabulary(self, ids: Tensor) -> None:
        """Raise ValueError if an id is outside the vocabulary."""


@contextlib.contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back afterwards.

    Walking the modules costs as much as a small layer, so only where the model is training.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
