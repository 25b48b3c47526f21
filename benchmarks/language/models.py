"""Language models by name, each from the package that it comes from: imported where one is built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """Embedding, nn.LSTM or nn.GRU of some layers, logits.

    Args:
        kind: nn.LSTM or nn.GRU.
        vocabulary: tokens.
        dim: width of embedding and layers.
        depth: layers.
        dropout: probability of dropping what goes into a layer above the first, and into the logits.
    """

    def __init__(
        self, kind: Callable[..., nn.Module], vocabulary: int, dim: int, depth: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.rnn = kind(dim, dim, num_layers=depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits and the state after the last step."""
        x, state = self.rnn(self.embedding(ids), state)
        return self.to_logits(self.dropout(self.norm(x))), state


class MambaModel(nn.Module):
    """Embedding, mambapy's Mamba, RMS norm, logits; started as mambapy's LM, which needs a GPU's packages, starts them.

    Args:
        vocabulary: tokens.
        options: of mambapy's MambaConfig.
    """

    def __init__(self, vocabulary: int, **options: Any) -> None:
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        super().__init__()
        config = MambaConfig(**options)
        self.embedding = nn.Embedding(vocabulary, config.d_model)
        self.mamba = Mamba(config)
        self.norm = RMSNorm(config.d_model)
        self.to_logits = nn.Linear(config.d_model, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("embedding.weight", "to_logits.weight", "in_proj.weight", "x_proj.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("out_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * config.n_layers) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.to_logits(self.norm(self.mamba(self.embedding(ids))))
        return logits

    def step(self, ids: Tensor, caches: Any) -> tuple[Tensor, Any]:
        """Logits after one more token (B,), and the caches."""
        if caches is None:
            config = self.mamba.config
            empty = torch.zeros(ids.shape[0], config.d_inner, config.d_conv - 1)
            caches = [(None, empty) for _ in range(config.n_layers)]
        x, caches = self.mamba.step(self.embedding(ids), caches)
        return self.to_logits(self.norm(x)).unsqueeze(1), caches


def gateloop(vocabulary: int, **options: Any) -> nn.Module:
    """The environment's `Transformer`: our own, or in the peers' that of gateloop-transformer 0.2.5."""
    from gateloop_transformer import Transformer

    return Transformer(num_tokens=vocabulary, **options)


def transformer(vocabulary: int, *, context: int, **options: Any) -> nn.Module:
    """Llama from transformers: rotary positions, SwiGLU, RMS norms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=context, use_cache=False, **options)
    return LlamaForCausalLM(config)


def mingru(vocabulary: int, **options: Any) -> nn.Module:
    """minLM of minGRU-pytorch."""
    from minGRU_pytorch.minLM import minLM

    return minLM(num_tokens=vocabulary, **options)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns."""
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output, tuple) else output.logits
    assert isinstance(found, torch.Tensor)
    return found


def step(model: str, module: nn.Module, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Logits after one more token (B, 1), and the state; as each package decodes. None: the start.

    The original keeps no state, and minGRU's convolution has none: they read all tokens again, which are their state.
    """
    if model == "gateloop":
        return module(ids, state=state, return_state=True)  # type: ignore[no-any-return]
    if model == "transformer":
        output = module(ids, past_key_values=state, use_cache=True)
        return output.logits, output.past_key_values
    if model in ("lstm", "gru"):
        return module(ids, state)  # type: ignore[no-any-return]
    if model == "mamba":
        return module.step(ids[:, 0], state)  # type: ignore[no-any-return, operator]
    ids = ids if state is None else torch.cat([state, ids], 1)
    return logits_of(module(ids))[:, -1:], ids


MODELS: dict[str, Callable[..., nn.Module]] = {
    "gateloop": gateloop,
    "transformer": transformer,
    "original": gateloop,
    "mingru": mingru,
    "mamba": MambaModel,
    "lstm": partial(Recurrent, nn.LSTM),
    "gru": partial(Recurrent, nn.GRU),
}
