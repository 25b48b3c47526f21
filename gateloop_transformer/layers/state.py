"""What a layer remembers between calls: NamedTuples of tensors, batch first in every tensor.

Every state (of a layer or of a model) has `detach`, `to`, `copy`, `select`, `repeat` and `batch_size`, and goes to and
from a safetensors file with `save_state` and `load_state`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gateloop_transformer.stored import DamageError, check_seal, parse_json, write_tensors

Self = TypeVar("Self", bound="State")

_FORMAT = "gateloop-state"
_VERSION = "2"


class State:
    """The methods that all states share. A subclass is also a NamedTuple of tensors or of further states."""

    __slots__ = ()

    def map(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `function` applied to every tensor."""
        return _map(self, function)  # type: ignore[no-any-return]

    def detach(self: Self) -> Self:
        """The same values, cut from the graph: for truncated backpropagation."""
        return self.map(Tensor.detach)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Every tensor moved or converted as by `Tensor.to`; counts stay integers."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            return tensor.to(torch.empty(0, device=tensor.device).to(*args, **kwargs).device)

        return self.map(convert)

    def copy(self: Self) -> Self:
        """The same values in memory of their own."""
        return self.map(Tensor.clone)

    def repeat(self: Self, times: int) -> Self:
        """Each row `times` times, copies of a row beside each other: (B, ...) → (B·times, ...).

        Raises:
            ValueError: times is no integer, or negative.
        """
        if not isinstance(times, int) or isinstance(times, bool) or times < 0:
            raise ValueError(f"repeat takes how many times to repeat each row, 0 or more, not {times!r}")
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))

    def select(self: Self, index: Tensor | list[int]) -> Self:
        """The rows `index` of the batch, in that order, repeats allowed: reorder, pick or repeat.

        Args:
            index: row numbers (N,), integer; or a boolean mask (B,).

        Raises:
            ValueError: an index is outside the batch, or the mask has another length.
        """
        size = self.batch_size
        try:
            rows = torch.as_tensor(index).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"select takes row numbers (N,) or a boolean mask (B,), not {index!r}") from error
        rows = rows.long() if rows.numel() == 0 else rows
        if rows.dtype == torch.bool:
            if rows.shape != (size,):
                raise ValueError(f"a boolean index must have shape ({size},), not {tuple(rows.shape)}")
            rows = rows.nonzero().flatten()
        if rows.ndim != 1 or rows.is_floating_point() or rows.is_complex():
            raise ValueError("select takes row numbers (N,) or a boolean mask (B,)")
        if rows.numel() and not (-size <= int(rows.min()) and int(rows.max()) < size):
            raise ValueError(f"select: rows {rows.tolist()} of a batch of {size}")
        return self.map(lambda tensor: tensor[rows.to(tensor.device)])

    @property
    def batch_size(self) -> int:
        """B, the first dimension of every tensor."""
        return next(iter(_leaves(self, "")))[1].shape[0]


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    items = [_map(item, function) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
        return
    names = getattr(value, "_fields", None) or [str(n) for n in range(len(value))]
    for name, item in zip(names, value, strict=True):
        yield from _leaves(item, f"{prefix}.{name}" if prefix else name)


class _GateLoopFields(NamedTuple):
    real: Tensor
    imaginary: Tensor
    inputs: Tensor


class GateLoopState(_GateLoopFields, State):
    """Of a `GateLoopedAttention`, constant in size.

    real, imaginary: the parts of S (B, H, K, V), float32 or better; inputs: the last layer inputs that the
    short convolution still needs (B, conv_size - 1, dim), of length 0 without one.
    """

    __slots__ = ()


class _SimpleGateLoopFields(NamedTuple):
    hidden: Tensor


class SimpleGateLoopState(_SimpleGateLoopFields, State):
    """Of a `SimpleGateLoopLayer`: hidden h (B, dim), float32 or better."""

    __slots__ = ()


class _AttentionFields(NamedTuple):
    keys: Tensor
    keys_imaginary: Tensor
    values: Tensor
    seen: Tensor


class AttentionState(_AttentionFields, State):
    """Of a `CausalFullAttention`: keys and values of past steps (B, heads, L, dim_head), the latest last.

    With data_dependent_rel_pos="gate_loop" the keys are complex and already decayed to the last step;
    otherwise keys_imaginary has L = 0. seen (B,): steps since the start of the sequence; where fewer than L, what
    stands before them in a row is not looked at. With a window L is less than it.
    """

    __slots__ = ()


LayerState = GateLoopState | SimpleGateLoopState | AttentionState


class _TransformerFields(NamedTuple):
    layers: tuple[LayerState, ...]


class TransformerState(_TransformerFields, State):
    """Of a `Transformer`: one state per layer, in order."""

    __slots__ = ()


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (GateLoopState, SimpleGateLoopState, AttentionState)}


def _describe(state: Any) -> Any:
    if isinstance(state, TransformerState):
        return [type(layer).__name__ for layer in state.layers]
    return type(state).__name__


def save_state(state: State, path: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
    """Write a state of a layer or a model to a safetensors file, whole or not at all.

    The file carries a checksum of all its bytes: `load_state` refuses it if one of them has changed.

    Args:
        state: any state of this library.
        path: of the file; an existing one is replaced.
        about: what else the file is to say, for `describe_state`.

    Raises:
        ValueError: not a state.
        OSError: the file cannot be written.
    """
    if not isinstance(state, State):
        raise ValueError(f"save_state takes a state of this library, not {type(state).__name__}")
    if any(not isinstance(text, str) for item in (about or {}).items() for text in item):
        raise ValueError(f"save_state: about must map texts to texts, not {about!r}")
    # Parts of a state may be views of the same memory.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in _leaves(state, "")
    }
    metadata = {"format": _FORMAT, "version": _VERSION, "kind": json.dumps(_describe(state))}
    metadata["about"] = json.dumps(dict(about or {}))
    whole = Path(os.path.abspath(path))
    try:
        write_tensors(whole, tensors, metadata)
    except OSError as error:
        raise OSError(f"cannot write {str(whole)!r}: {error}") from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a state file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not os.path.isfile(path):
        raise FileNotFoundError(f"no state file {os.fspath(path)!r}")
    content = Path(path).read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file: {error}") from error
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], repr(os.fspath(path)))
    metadata: dict[str, str] = header.get("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)!r} holds no gate loop state, or is damaged")
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} is of state format {metadata.get('version')}, this library reads {_VERSION}"
        )
    if not check_seal(io.BytesIO(content), repr(os.fspath(path))):
        raise DamageError(f"{os.fspath(path)!r} is damaged: it has no checksum")
    return tensors, metadata


def _part(path: str | os.PathLike[str], metadata: Mapping[str, str], name: str) -> Any:
    """What the metadata of a state file says under a name, in JSON.

    Raises:
        ValueError: it says nothing there, or no JSON.
    """
    where = repr(os.fspath(path))
    if name not in metadata:
        raise DamageError(f"{where} is damaged: it lacks parts of a state: {name!r}")
    return parse_json(metadata[name], f"{name!r} in {where}")


def describe_state(path: str | os.PathLike[str]) -> dict[str, str]:
    """What `save_state` was told about a state.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds something else, or is of another format.
    """
    about = _part(path, _read(path)[1], "about")
    if not isinstance(about, dict) or any(not isinstance(value, str) for value in about.values()):
        raise DamageError(f"{os.fspath(path)!r} is damaged: its 'about' does not map texts to texts")
    return about


def load_state(path: str | os.PathLike[str]) -> State:
    """Read a state that `save_state` wrote; its tensors are on the CPU.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged (not a byte may differ), holds something else, or is of another format.
    """
    tensors, metadata = _read(path)
    kind = _part(path, metadata, "kind")
    try:
        if isinstance(kind, str):
            state: State = _build(kind, tensors, "")
            return state
        return TransformerState(tuple(_build(name, tensors, f"layers.{n}.") for n, name in enumerate(kind)))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged: it lacks parts of a state: {error}") from error


def _build(kind: str, tensors: dict[str, Tensor], prefix: str) -> Any:
    fields = _KINDS[kind]
    return fields(**{name: tensors[prefix + name] for name in fields._fields})


def start_of(
    layer: nn.Module, batch: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of what a layer is going to read, for its `initial_state`; None: those of its weights.

    Raises:
        ValueError: batch is no integer, or negative.
    """
    name = type(layer).__name__
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 0:
        raise ValueError(f"{name}: initial_state takes the number of rows, an integer of 0 or more, not {batch!r}")
    weights = (each for each in itertools.chain(layer.parameters(), layer.buffers()) if each.is_floating_point())
    like = next(weights, torch.empty(0))
    return torch.device(like.device if device is None else device), like.dtype if dtype is None else dtype


def check_state(layer: str, state: object, kind: type[State], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """`state` is of `kind` and its tensors have `shapes` (None: any size).

    Raises:
        ValueError: it is not, or they have not.
    """
    if not isinstance(state, kind):
        raise ValueError(f"{layer}: state must be a {kind.__name__}, not {type(state).__name__}")
    for name, expected in shapes.items():
        part = getattr(state, name)
        if not isinstance(part, Tensor):
            raise ValueError(f"{layer}: state.{name} must be a torch tensor, not {type(part).__name__}")
        shape = part.shape
        fits = len(shape) == len(expected) and all(
            want is None or size == want for size, want in zip(shape, expected, strict=True)
        )
        if not fits:
            want = tuple("any" if size is None else size for size in expected)
            raise ValueError(f"{layer}: state.{name} must have shape {want}, not {tuple(shape)}")
