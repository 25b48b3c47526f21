"""Saves and loads parameters in the files and folders of the torch side, to the bit and without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.files import write_text
from gateloop_transformer.jax.model import Transformer
from gateloop_transformer.jax.pairs import Array
from gateloop_transformer.jax.parts import Params
from gateloop_transformer.runs.config import RunConfig, flat, is_flat, read_flat
from gateloop_transformer.runs.weights import (
    CONFIG,
    MODEL,
    check_written_for,
    describe,
    misfit,
    published,
    read_headers,
    weight_files,
)
from gateloop_transformer.stored import check_seal, opened_tensors, read_json, write_tensors


def flatten(params: Params) -> dict[str, Array]:
    """Flatten a tree of parameters to arrays by torch's names.

    >>> flatten({"to_out": {"1": {"bias": jnp.zeros(2)}}}).keys()
    dict_keys(['to_out.1.bias'])
    """
    found: dict[str, Array] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found |= {f"{name}.{rest}": array for rest, array in flatten(value).items()}
        else:
            found[name] = value
    return found


def unflatten(tensors: dict[str, Any]) -> Params:
    """Undo `flatten`: make a tree of arrays (of JAX, NumPy, or torch's `.numpy()`) by torch's names.

    >>> unflatten({"to_out.1.bias": jnp.zeros(2)})["to_out"]["1"]["bias"].shape
    (2,)
    """
    return _nested({name: jnp.asarray(value) for name, value in tensors.items()})


def _nested(values: dict[str, Any]) -> Params:
    """Nest values by names with dots as dictionaries within dictionaries."""
    tree: Params = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def save_params(path: str | os.PathLike[str], params: Params) -> None:
    """Write the parameters of a model or a layer to a safetensors file whose names fit torch's `load_state_dict`.

    Raises:
        OSError: it cannot be written.
    """
    _write(Path(path), params, {})


def _write(path: Path, params: Params, metadata: dict[str, str]) -> None:
    write_tensors(path, flatten(params), {"format": "pt", **metadata}, "flax")


def load_params(path: str | os.PathLike[str]) -> Params:
    """Load the parameters in a safetensors file, in the dtypes that they have there.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds float64 and JAX is not set to use that.
    """
    return _nested(_read(Path(path))[0])


def _read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the arrays of a safetensors file by name, and its metadata."""
    with opened_tensors(path, "flax") as file:
        wide = [name for name in file.keys() if file.get_slice(name).get_dtype() == "F64"]  # noqa: SIM118
        metadata = file.metadata() or {}
        if wide and jnp.zeros(0, float).dtype != jnp.float64:
            raise ValueError(
                f"{str(path)!r} holds float64 ({wide[0]}), which JAX narrows to float32 unless told otherwise: "
                'jax.config.update("jax_enable_x64", True)'
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with path.open("rb") as content:
        check_seal(content, repr(str(path)))
    return tensors, metadata


def save_model(folder: str | os.PathLike[str], model: Transformer, params: Params) -> None:
    """Write config.json and model.safetensors, which `gateloop_transformer.load_model` and transformers read.

    Args:
        folder: the folder to write to; it is made if it does not exist.
        model: the description.
        params: its parameters.

    Raises:
        ValueError: the parameters are not this model's, or the folder holds a run, which is not replaced.
    """
    path = Path(folder)
    check_fit(model, params, "params")
    if (path / CONFIG).is_file() and not is_flat(read_json(path / CONFIG)):
        raise ValueError(f"{str(folder)!r} holds a run; choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    _write(path / MODEL, params, {"model": describe(model.config)})
    write_text(path / CONFIG, json.dumps(flat(model.config, model.num_tokens), indent=2) + "\n")


def load_model(folder: str | os.PathLike[str]) -> tuple[Transformer, Params]:
    """Load the model in a folder that `gateloop train`, transformers or `save_model` wrote.

    Returns:
        The description, and its parameters in the dtypes that they are stored in.

    Raises:
        ValueError: the folder holds no model, has no weights yet, or a file is damaged or does not fit.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{str(folder)!r} is a file, not the folder of a model")
    if not path.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    if not (path / CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} holds no model: it has no {CONFIG}")
    values, where = read_json(path / CONFIG), repr(str(path / CONFIG))
    if is_flat(values):
        config, size = read_flat(values, where)
    else:
        run = RunConfig.from_json(values, where)
        config, size = run.model, run.tokenizer.size
    weights = published(path)
    read_headers(weights, config.depth)
    model = Transformer.of(config, size)
    tensors: dict[str, Array] = {}
    for file in weight_files(weights):
        part, metadata = _read(file)
        check_written_for(file, metadata, config)
        tensors |= part
    params = _nested(tensors)
    check_fit(model, params, repr(str(path / MODEL)))
    return model, params


def check_fit(model: Transformer, params: Params, where: str) -> None:
    """Check that a tree has the names and shapes of a model's parameters.

    Raises:
        ValueError: it has not.
    """
    own, given = flatten(jax.eval_shape(model.init, jax.random.key(0))), flatten(params)
    if (problem := misfit(own, given)) is not None:
        raise ValueError(f"{where} does not fit the model: {problem}")


def parameter_groups(params: Params) -> Params:
    """Label each parameter by how it is trained, for `optax.multi_transform`.

    "gate": parameters that only make gates, to be trained with a lower learning rate and no weight decay; "matrix":
    weights of linear maps, with weight decay; "other": norms, biases, embeddings and convolutions; "fixed": not
    trained.
    """

    def group(name: str, x: Any) -> str:
        parts = name.split(".")
        if "to_a" in parts or parts[-1] in ("ring_logit", "ring_phase"):
            return "gate"
        if parts[-1] == "freqs":
            return "fixed"
        return "matrix" if parts[-1] == "weight" and x.ndim == 2 and "token_emb" not in parts else "other"

    return _nested({name: group(name, x) for name, x in flatten(params).items()})
