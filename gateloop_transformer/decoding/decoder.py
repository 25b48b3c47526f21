"""What decoding needs of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from gateloop_transformer.layers.state import TransformerState


class Decoder(Protocol):
    """The methods that generation calls; `Transformer` has them."""

    num_tokens: int
    training: bool

    def __call__(
        self, ids: Tensor, *, state: TransformerState | None, return_state: bool, mask: Tensor | None = None
    ) -> Any:
        """Return logits (B, T, num_tokens) and the state; steps where a mask (B, T) is False are skipped."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training or evaluation mode."""

    def modules(self) -> Iterator[Any]:
        """All modules, each with a flag `training`."""

    def check_vocabulary(self, ids: Tensor) -> None:
        """Raise ValueError if an id is outside the vocabulary."""


@contextlib.contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Switch to evaluation mode, and afterwards give each module its own mode back.

    Walking the modules costs as much as a small layer, so it is done only where the model is training.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
