"""The state of a model as a flat list of tensors, and a model as a function of tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.quantized import SmallLinear
from gateloop_transformer.layers.state import AttentionState, GateLoopState, LayerState, TransformerState
from gateloop_transformer.model import Transformer
from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.pairs import compute_dtype

Mixer = GateLoopedAttention | CausalFullAttention


class Part(NamedTuple):
    """A tensor of a state. shape: its shape without the batch; None: it is the steps read so far, 0 at the start."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


def check_model(caller: str, model: object) -> Transformer:
    """Check that a model can be exported, and return it.

    Raises:
        ValueError: it is not a `Transformer`, or its weights are quantized.
    """
    refuse(caller, "call it outside of the block")
    if not isinstance(model, Transformer):
        raise ValueError(f"{caller}: model must be a Transformer, not {type(model).__name__}")
    if any(isinstance(module, SmallLinear) for module in model.modules()):
        raise ValueError(f"{caller}: the model is quantized; give the model that `quantize` was called on")
    return model


def dimension(name: str, least: int, most: int = 2**31 - 1) -> Any:
    """A dynamic dimension; torch 2.6 exports none without a largest size."""
    return Dim(name, min=least, max=most)


def mixers(model: Transformer) -> list[Mixer]:
    """The time mixer of each layer."""
    return [cast(Mixer, cast(nn.ModuleList, block)[0].fn) for block in model.layers]


def start_state(model: Transformer, like: Tensor, extra: int = 0) -> TransformerState:
    """The state of a model that has read nothing: zeros.

    Args:
        model: the model.
        like: a tensor (B, ...) with the state's batch size and device.
        extra: number of keys in attention layers beyond those of the window, none of them ever seen.
    """
    dtype = model.token_emb.weight.dtype

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(like.shape[0], *shape, dtype=dtype, device=like.device)

    states: list[LayerState] = []
    for mixer in mixers(model):
        if isinstance(mixer, GateLoopedAttention):
            matrix = zeros(mixer.heads, mixer.dim_head, mixer.dim_head, dtype=compute_dtype(dtype))
            taps = 0 if mixer.conv is None else mixer.conv.taps - 1
            states.append(GateLoopState(matrix, matrix.clone(), zeros(taps, mixer.dim)))
            continue
        kept = extra + (0 if mixer.window is None else mixer.window - 1)
        decayed = kept if mixer.data_dependent_rel_pos == "gate_loop" else 0
        keys, imaginary, values = (zeros(mixer.heads, n, mixer.dim_head) for n in (kept, decayed, kept))
        states.append(AttentionState(keys, imaginary, values, zeros(dtype=torch.int64)))
    return TransformerState(tuple(states))


def window(model: Transformer) -> int | None:
    """The window that all attention layers share; None: they have none, or there are no such layers."""
    windows = [mixer.window for mixer in mixers(model) if isinstance(mixer, CausalFullAttention)]
    return windows[0] if windows else None


def _named(state: TransformerState) -> Iterator[tuple[str, Tensor]]:
    for n, layer in enumerate(state.layers):
        for field, tensor in zip(layer._fields, layer, strict=True):
            yield f"layers.{n}.{field}", tensor


def _parts(model: Transformer) -> Iterator[Part]:
    one = torch.zeros(1, device=model.token_emb.weight.device)
    grown = start_state(model, one, 1 if window(model) is None else 0)
    for (name, start), (_, later) in zip(_named(start_state(model, one)), _named(grown), strict=True):
        shape = (a if a == b else None for a, b in zip(start.shape[1:], later.shape[1:], strict=True))
        if later.numel():
            yield Part(name, tuple(shape), start.dtype)


class Reader(nn.Module):
    """A model as a function of tensors: (ids, state) → (logits, new state).

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.parts = list(_parts(model))
        # The names of all tensors, including those without elements.
        self.names = [name for name, _ in _named(start_state(model, model.token_emb.weight[:1, 0]))]

    def forward(self, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Read a block.

        Args:
            ids: (B, T).
            given: the state: a tensor (B, ...) for each of `parts`.

        Returns:
            Logits (B, T, vocabulary), and a tensor for each of `parts`.
        """
        by_name = dict(zip((part.name for part in self.parts), given, strict=True))
        names = iter(self.names)
        state = start_state(self.model, ids).map(lambda nothing: by_name.get(next(names), nothing))
        logits, state = self.model(ids, state=state, return_state=True)
        tensors = [tensor for layer in state.layers for tensor in layer]
        return logits, *(tensor for name, tensor in zip(self.names, tensors, strict=True) if name in by_name)
