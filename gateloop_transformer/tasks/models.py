"""The models that learn a task: a Transformer of gate loops or attention, or a recurrent net of torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.model import Transformer


class RecurrentNet(nn.Module):
    """An embedding, nn.LSTM or nn.GRU, and logits; called like a `Transformer`.

    Args:
        kind: "lstm" or "gru".
        num_tokens: size of the vocabulary.
        dim: width.
        depth: number of layers.
        dropout: probability of dropout between layers.
    """

    def __init__(self, kind: str, num_tokens: int, dim: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        layers = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        self.layers = layers(dim, dim, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(self, ids: Tensor, state: Any = None, *, return_state: bool = False) -> Any:
        """Compute logits (B, T, num_tokens) from ids (B, T), or (logits, state)."""
        y, state = self.layers(self.token_emb(ids), state)
        logits = self.to_logits(y)
        return (logits, state) if return_state else logits


def build_model(kind: str, config: TransformerConfig, vocabulary: int) -> nn.Module:
    """Build a new model with weights from torch's generator.

    Args:
        kind: a name in `settings.MODELS`.
        config: configuration of the model.
        vocabulary: size of the vocabulary.

    Raises:
        ValueError: no model has this configuration.
    """
    if kind in ("lstm", "gru"):
        if min(config.dim, config.depth) < 1:
            raise ValueError(f"dim and depth must be at least 1, not {config.dim} and {config.depth}")
        return RecurrentNet(kind, vocabulary, config.dim, config.depth, config.dropout)
    return Transformer(**config.arguments(vocabulary))
