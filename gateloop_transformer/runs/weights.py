"""Where a folder's weights are and whose they are: for torch and for JAX, importing neither."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.stored import DamageError, opened_tensors, parse_json, read_json

CONFIG, MODEL, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"


def published(folder: Path) -> Path:
    """The file of a folder's weights, or the index of several.

    Raises:
        ValueError: there is neither.
    """
    found = next((folder / name for name in (MODEL, SHARDS) if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{str(folder)!r} has no {MODEL}: no checkpoint of its run was finished, or it was taken away")
    return found


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: those that an index names, or the file itself.

    Raises:
        ValueError: it is no index, or names other files than safetensors beside it.
    """
    if path.name != SHARDS:
        return [path]
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(map(_is_beside, names.values())):
        raise ValueError(f"{str(path)!r} is no index of weights")
    return [path.with_name(name) for name in sorted(set(names.values()))]


def _is_beside(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]


def read_headers(path: Path, depth: int) -> dict[str, Header]:
    """The shapes of the tensors in a file of weights, or in those that an index names; the tensors are not read.

    Whoever builds a model of a configuration asks here first, with its number of layers: no more are built than there
    are weights of.

    Raises:
        ValueError: a file is missing or damaged, or there is another number of layers.
    """
    found: dict[str, Header] = {}
    for part in weight_files(path):
        with opened_tensors(part, "np") as file:
            found |= {name: Header(tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    layers = len({name.split(".")[1] for name in found if name.startswith("layers.")})
    if layers != depth:
        raise ValueError(f"{str(path)!r} does not fit {CONFIG}: it has {layers} layers, not {depth}")
    return found


def describe(config: TransformerConfig) -> str:
    """A model's configuration, kept with its weights: other models may have the same shapes."""
    return json.dumps(vars(config), sort_keys=True)


def check_written_for(path: Path, metadata: Mapping[str, str], config: TransformerConfig) -> None:
    """Check that a file of weights that says whose they are was written for this model.

    Raises:
        ValueError: it is another's.
    """
    if (text := metadata.get("model")) is None:
        return
    described = None
    with contextlib.suppress(DamageError):
        described = parse_json(text, repr(str(path)))
    if described != vars(config):
        raise ValueError(f"{str(path)!r} does not fit {CONFIG}: it was written for {text}")


def differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Names that arrays or tensors `given` lack of a model's `own`, that it has not, and whose shapes are others."""
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    return missing, unknown, [name for name in own if name in given and given[name].shape != own[name].shape]


def misfit(own: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """What keeps arrays or tensors `given` from being a model's `own`, by names and shapes: the first, and how many."""
    missing, unknown, reshaped = differences(own, given)
    problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
    problems += [f"{name} is {tuple(given[name].shape)}, the model has {tuple(own[name].shape)}" for name in reshaped]
    if not problems:
        return None
    return problems[0] + (f" and {len(problems) - 1} more" if len(problems) > 1 else "")
