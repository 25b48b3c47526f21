"""State dicts in the files of others: read without running what is in them, found among whatever else is there."""

from __future__ import annotations

import errno
import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.conversion.pickled_modules import STAND_INS, PickledModule
from gateloop_transformer.stored import read_tensors

# What DDP, torch.compile, FSDP and activation checkpointing put into the names of parameters.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Mappings within mappings, at most.
_DEEPEST = 8
# What torch.load raises for bytes that are no checkpoint: found by trying damaged files.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    *(RuntimeError, EOFError, ValueError, LookupError, AssertionError, TypeError, AttributeError, OverflowError),
)
# The name of a parameter that tells a layer of the original's.
_LAYERS = {
    "to_qkva.0.weight": "SimpleGateLoopLayer",
    "to_qkv.weight": "GateLoopedAttention",
    "to_qkv.0.weight": "CausalFullAttention",
}


class StateDict(NamedTuple):
    """A model's part of a file.

    values: by their names in the model, wrappers taken out of these; mostly tensors. entry: where in the file they
    are, as names joined by dots; empty: at the top. left_out: what else there is, by the parts of names that tell it.
    module: the model itself, where the file has it whole.
    """

    values: dict[str, Any]
    entry: str
    left_out: list[str]
    module: PickledModule | None


def read_file(path: Path) -> Mapping[Any, Any]:
    """What a safetensors file or a torch checkpoint holds, on the CPU; nothing of it is executed.

    Raises:
        ValueError: there is no such file, it is none of these or damaged, it is this package's own, or it is a pickle
            that needs code.
    """
    where = repr(str(path))
    if path.is_dir():
        raise ValueError(f"{where} is a folder; expected a checkpoint, such as a .pt or .safetensors file")
    if not path.is_file():
        raise ValueError(f"no file {where}")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{where} is empty")
    if path.suffix == ".safetensors" or head[8:] == b"{":
        tensors, metadata = read_tensors(path)
        if "model" in metadata:
            raise ValueError(f"{where} was written by this version of gateloop-transformer: it needs no conversion")
        return tensors
    content = _load(path, where)
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds one {type(content).__name__}, not a state dict")
    return content


def _load(path: Path, where: str) -> Any:
    try:
        with warnings.catch_warnings():
            # Of the layout of damaged files, which are refused below.
            warnings.simplefilter("ignore", UserWarning)
            with torch.serialization.safe_globals(list(STAND_INS)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # So torch says that a file ends too soon.
        raise ValueError(f"{where} is damaged") from error
    except _UNREADABLE as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            None if name is None else f"its pickle asks for {name[1]}, which is code and not a tensor or a plain value"
        )
        if "persistent_load of storage" in str(error):
            reason = "it holds a whole module in torch's old format of files, with source code"
        if isinstance(error, pickle.UnpicklingError) and reason is not None:
            raise ValueError(
                f"{where} is refused: {reason}; nothing was executed. Where you trust it, load it where all that it "
                "names is installed, and save the state dict alone: model = torch.load(OLD, weights_only=False); "
                "torch.save(model.state_dict(), NEW)"
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(f"{where} is refused: it is a TorchScript program; nothing was executed") from error
        if "maximum supported version" in str(error):
            raise ValueError(f"{where} was written by a newer torch than {torch.__version__}: update torch") from error
        raise ValueError(f"{where} is no checkpoint of torch or safetensors, or it is damaged") from error


def find_model(content: Mapping[Any, Any], where: str, entry: str | None = None) -> StateDict:
    """The state dict of a Transformer, wherever in a file it is.

    Args:
        content: of the file.
        where: it came from, for errors.
        entry: which one, where there are several; None: there is one.

    Raises:
        ValueError: there is none, or there are several and `entry` is none of them.
    """
    leaves = list(_leaves(content))
    if not any(isinstance(value, Tensor) for _, value in leaves):
        raise ValueError(f"{where} holds no tensors")
    roots = sorted({name.removesuffix("token_emb.weight") for name, _ in leaves if _ends(name, "token_emb.weight")})
    if not roots:
        raise ValueError(f"{where} holds no Transformer: {_kind([name for name, _ in leaves])}")
    entries = {root.removesuffix("."): root for root in roots}
    if entry is None and len(roots) > 1:
        raise ValueError(f"{where} holds several models: choose one with --entry {' or '.join(map(repr, entries))}")
    if entry is not None and entry not in entries:
        raise ValueError(f"{where} has no model in the entry {entry!r}; there is {', '.join(map(repr, entries))}")
    root = roots[0] if entry is None else entries[entry]
    inner = tuple(other for other in roots if other != root and other.startswith(root))
    values: dict[str, Any] = {}
    left_out = set()
    for name, value in leaves:
        if not name.startswith(root) or (inner and name.startswith(inner)):
            left_out.add(_beside(name, root))
        elif (own := name.removeprefix(root)) in values:
            raise ValueError(f"{where} has {own} twice, under names that differ in {', '.join(sorted(_WRAPPERS))}")
        else:
            values[own] = value
    module = next((module for name, module in _modules(content) if name == root and "token_emb.weight" in module), None)
    return StateDict(values, root.removesuffix("."), sorted(left_out), module)


def _leaves(content: Mapping[Any, Any], before: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Whatever is no mapping, by all names that lead to it, without wrappers in its own."""
    for key, value in content.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _leaves(value, f"{before}{key}.", depth + 1)
        else:
            yield before + _unwrapped(key), value


def _modules(content: Mapping[Any, Any], before: str = "", depth: int = 1) -> Iterator[tuple[str, PickledModule]]:
    """Whole modules, and those within them, by what the names of their tensors begin with."""
    if isinstance(content, PickledModule):
        for name, module in content.modules():
            own = _unwrapped(name)
            yield f"{before}{own}." if own else before, module
        return
    for key, value in content.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _modules(value, f"{before}{key}.", depth + 1)


def _unwrapped(name: Any) -> str:
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def _beside(name: str, root: str) -> str:
    """A name up to where it leaves the way to the root."""
    parts, way = name.split("."), root.split(".")
    same = next((n for n, (one, other) in enumerate(zip(parts, way, strict=False)) if one != other), len(way))
    return ".".join(parts[: same + 1])


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _kind(names: list[str]) -> str:
    """What a file without an embedding looks like."""
    for end, layer in _LAYERS.items():
        found = [name for name in names if _ends(name, end)]
        if found and not re.search(r"layers\.\d+\.", found[0]):
            return (
                f"it looks like a single {layer} ({found[0]}), which needs no conversion: "
                f"{layer}(...).load_state_dict takes it as it is"
            )
    some = ", ".join(names[:3])
    return f"it has no token_emb.weight among {some}{' and others' if len(names) > 3 else ''}"
