"""States: what a layer remembers between calls. They are NamedTuples of tensors, with the batch dimension first.

Every state (of a layer or of a model) has `detach`, `to`, `copy`, `select`, `repeat` and `batch_size`; `save_state`
writes it to a safetensors file and `load_state` reads it back.
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
        """Apply `function` to every tensor."""
        return _map(self, function)  # type: ignore[no-any-return]

    def detach(self: Self) -> Self:
        """Detach every tensor from the graph, for truncated backpropagation."""
        return self.map(Tensor.detach)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert every tensor as `Tensor.to` does; counts stay integers."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            return tensor.to(torch.empty(0, device=tensor.device).to(*args, **kwargs).device)

        return self.map(convert)

    def copy(self: Self) -> Self:
        """Copy every tensor."""
        return self.map(Tensor.clone)

    def repeat(self: Self, times: int) -> Self:
        """Repeat each row `times` times, with the copies of a row next to each other: (B, ...) → (B·times, ...).

        Raises:
            ValueError: times is not an integer, or is negative.
        """
        if not isinstance(times, int) or isinstance(times, bool) or times < 0:
            raise ValueError(f"repeat: times must be an integer of 0 or more, not {times!r}")
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))

    def select(self: Self, index: Tensor | list[int]) -> Self:
        """Take the rows `index` of the batch, in that order; a row may be taken more than once.

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
            raise ValueError(f"select: rows {rows.tolist()} must be in a batch of {size}")
        return self.map(lambda tensor: tensor[rows.to(tensor.device)])

    @property
    def batch_size(self) -> int:
        """The batch size B, the first dimension of every tensor."""
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
    """The state of a `GateLoopedAttention`; its size is constant.

    real, imaginary: the two parts of S (B, H, K, V), float32 or better; inputs: the last layer inputs, which the
    short convolution still needs (B, conv_size - 1, dim); their length is 0 without a convolution.
    """

    __slots__ = ()


class _SimpleGateLoopFields(NamedTuple):
    hidden: Tensor


class SimpleGateLoopState(_SimpleGateLoopFields, State):
    """The state of a `SimpleGateLoopLayer`: hidden h (B, dim), float32 or better."""

    __slots__ = ()


class _AttentionFields(NamedTuple):
    keys: Tensor
    keys_imaginary: Tensor
    values: Tensor
    seen: Tensor


class AttentionState(_AttentionFields, State):
    """The state of a `CausalFullAttention`: keys and values of past steps (B, heads, L, dim_head), the latest last.

    With data_dependent_rel_pos="gate_loop" the keys are complex and already decayed to the last step;
    otherwise keys_imaginary has L = 0. seen (B,): steps since the start of the sequence; in a row that has seen fewer
    than L steps, earlier entries are ignored. With a window, L is less than the window.
    """

    __slots__ = ()


LayerState = GateLoopState | SimpleGateLoopState | AttentionState


class _TransformerFields(NamedTuple):
    layers: tuple[LayerState, ...]


class TransformerState(_TransformerFields, State):
    """The state of a `Transformer`: one state per layer, in order."""

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
        path: where to write the file; an existing file is replaced.
        about: notes to keep in the file, which `describe_state` reads back.

    Raises:
        ValueError: state is not a state of this library, or about is not a mapping of strings.
        OSError: the file cannot be written.
    """
    if not isinstance(state, State):
        raise ValueError(f"save_state takes a state of this library, not {type(state).__name__}")
    if any(not isinstance(text, str) for item in (about or {}).items() for text in item):
        raise ValueError(f"save_state: about must map strings to strings, not {about!r}")
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
    """Read the tensors and the metadata of a state file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not os.path.isfile(path):
        raise FileNotFoundError(f"no state file {os.fspath(path)!r}")
    content = Path(path).read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or not a safetensors file: {error}") from error
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], repr(os.fspath(path)))
    metadata: dict[str, str] = header.get("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)!r} does not hold a gate loop state, or is damaged")
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has state format {metadata.get('version')}; this library reads format {_VERSION}"
        )
    if not check_seal(io.BytesIO(content), repr(os.fspath(path))):
        raise DamageError(f"{os.fspath(path)!r} is damaged: it has no checksum")
    return tensors, metadata


def _part(path: str | os.PathLike[str], metadata: Mapping[str, str], name: str) -> Any:
    """Read the JSON value that the metadata of a state file has under `name`.

    Raises:
        ValueError: there is no such entry, or it is not JSON.
    """
    where = repr(os.fspath(path))
    if name not in metadata:
        raise DamageError(f"{where} is damaged: it lacks parts of a state: {name!r}")
    return parse_json(metadata[name], f"{name!r} in {where}")


def describe_state(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the notes that were given to `save_state` as `about`.

    Args:
        path: the state file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds something else, or has another format.
    """
    about = _part(path, _read(path)[1], "about")
    if not isinstance(about, dict) or any(not isinstance(value, str) for value in about.values()):
        raise DamageError(f"{os.fspath(path)!r} is damaged: its 'about' does not map strings to strings")
    return about


def load_state(path: str | os.PathLike[str]) -> State:
    """Read a state that `save_state` wrote; its tensors are on the CPU.

    Args:
        path: the state file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged (any changed byte counts), holds something else, or has another format.
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
    """The device and dtype for a layer's `initial_state`: those given, or where None is given those of its weights.

    Raises:
        ValueError: batch is not an integer, or is negative.
    """
    name = type(layer).__name__
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 0:
        raise ValueError(f"{name}: initial_state: batch must be an integer of 0 or more, not {batch!r}")
    weights = (each for each in itertools.chain(layer.parameters(), layer.buffers()) if each.is_floating_point())
    like = next(weights, torch.empty(0))
    return torch.device(like.device if device is None else device), like.dtype if dtype is None else dtype


def check_state(layer: str, state: object, kind: type[State], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Check that `state` is of `kind` and that its tensors have the given `shapes` (None: any size).

    Raises:
        ValueError: the state is of another kind, or one of its tensors has another shape.
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
