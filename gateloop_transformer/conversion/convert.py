"""Checkpoints of the original package (gateloop-transformer 0.2.5) as folders that this one loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.conversion import pickled_modules
from gateloop_transformer.conversion.original import Arguments, infer
from gateloop_transformer.conversion.pickled_modules import PickledModule
from gateloop_transformer.conversion.state_dicts import find_model, read_file
from gateloop_transformer.data.bpe import load_tokenizer_file
from gateloop_transformer.data.tokenizer import TOKENIZER, TOKENIZER_CONFIG, ByteTokenizer, Tokenizer, holds_bytes
from gateloop_transformer.files import PARTIAL, make_folder, remove, sync, write_text
from gateloop_transformer.model import Transformer
from gateloop_transformer.runs.config import flat, is_flat
from gateloop_transformer.runs.weights import CONFIG, MODEL, describe, differences
from gateloop_transformer.stored import parse_json, read_json, write_tensors

_FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, MODEL)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def convert(
    source: Path,
    out: Path,
    given: Mapping[str, Any],
    *,
    tokenizer: str | None = None,
    entry: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint of the original's Transformer as model.safetensors and config.json.

    Args:
        source: a state dict in a torch checkpoint or a safetensors file, under whatever entry or wrapper; or a whole
            model in a torch checkpoint.
        out: the folder, new or empty.
        given: arguments of the original's Transformer that are known.
        tokenizer: of the model's tokens: "bytes", or the path of a tokenizer.json; None: bytes where there are 256
            tokens, else none.
        entry: of the source, where it holds several models.
        overwrite: `out` may hold an earlier conversion.

    Returns:
        What was done, for JSON: where the value of each argument is from, what was written, and "warnings".

    Raises:
        ValueError: the source holds no such model or does not fit what was given, an argument is open, or `out` holds
            something else.
    """
    _check_out(out, source, overwrite)
    found = find_model(read_file(source), repr(str(source)), entry)
    try:
        tensors = _tensors(found.values)
        seen = {} if found.module is None else pickled_modules.arguments(found.module)
        arguments = infer({name: tuple(tensor.shape) for name, tensor in tensors.items()}, given, seen)
        _check_fit(tensors, arguments, found.module)
        notes = _exact_rotation(tensors, arguments)
    except ValueError as error:
        part = f", entry {found.entry!r}" if found.entry else ""
        raise ValueError(f"{str(source)!r}{part}: {error}") from error
    size = arguments.values()["num_tokens"]
    reads = _tokenizer(tokenizer, size)
    if reads is None:
        notes.append(f"no --tokenizer: the model has {size:,} tokens, and text cannot be encoded for it")
    elif reads.size < size:
        notes.append(f"the tokenizer has {reads.size:,} tokens, the model {size:,}: the others are never read")
    _write(out, arguments.config(), size, reads, tensors)
    return {
        "source": str(source),
        "out": str(out),
        "entry": found.entry,
        "left_out": found.left_out,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "tokenizer": None if reads is None else reads.kind,
        **arguments._asdict(),
        "warnings": notes,
    }


def read_arguments(text: str) -> dict[str, Any]:
    """Arguments of the original from JSON, or from the file of that name.

    Raises:
        ValueError: there is no such file, or it is no JSON object.
    """
    inline = text.lstrip().startswith("{")
    if not inline and not Path(text).is_file():
        raise ValueError(f"--config: {text!r} is neither a JSON object nor a file")
    try:
        values = parse_json(text, repr(text)) if inline else read_json(text)
    except ValueError as error:
        raise ValueError(f"--config: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'--config: expected an object such as {{"heads": 8}}, not {values!r}')
    return values


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    where = repr(str(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{where} is a file, not a folder")
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if not present:
        return
    config = read_json(out / CONFIG) if CONFIG in present else None
    for name in _FILES:
        if (out / name).is_dir():
            raise ValueError(f"{str(out / name)!r} is a folder, not a file: choose another folder")
    others = sorted(present - {name for file in _FILES for name in (file, f"{file}{PARTIAL}")})
    if others or not is_flat(config):
        raise ValueError(f"{where} holds {(others or sorted(present))[0]}: choose a folder that is new or empty")
    if not overwrite:
        raise ValueError(f"{where} already holds a model: replace it with --overwrite")
    if source.exists() and source.resolve().parent == out.resolve():
        raise ValueError(f"{str(source)!r} is in the folder that would be overwritten")


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters, each with memory of its own."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is no tensor but {type(value).__name__}")
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not plain or value.dtype not in _DTYPES or value.is_meta:
            kind = type(value).__name__ if type(value) is not Tensor else f"{value.layout}, {value.dtype}"
            accepted = ", ".join(str(dtype) for dtype in _DTYPES)
            raise ValueError(f"{name} is {kind} on {value.device.type}; expected a whole, plain tensor of {accepted}")
        value = value.detach()
        memory = value.untyped_storage()
        # Tied and sliced tensors share memory, which safetensors refuses.
        own = memory.data_ptr() not in seen and memory.nbytes() == value.nbytes
        seen.add(memory.data_ptr())
        tensors[name] = value if own else value.clone(memory_format=torch.contiguous_format)
    return tensors


def _check_fit(tensors: dict[str, Tensor], arguments: Arguments, module: PickledModule | None) -> None:
    """Names and shapes are those of such a model, all of them and no others, and so are its parts."""
    with torch.device("meta"):
        model = Transformer(**arguments.config().arguments(arguments.values()["num_tokens"]))
    own = model.state_dict()
    missing, unknown, reshaped = differences(own, tensors)
    problems = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
    problems += [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}" for name in reshaped]
    if problems:
        more = f" and {len(problems) - 1} more such" if len(problems) > 1 else ""
        raise ValueError(f"not a Transformer of gateloop-transformer 0.2.5: {problems[0]}{more}")
    if module is not None:
        pickled_modules.check_parts(module, model)


def _exact_rotation(tensors: dict[str, Tensor], arguments: Arguments) -> list[str]:
    """Give rotary frequencies of half precision the digits back that positions of a thousand steps need.

    Returns:
        What there is to say about it.
    """
    values, notes = arguments.values(), []
    names = [name for name in tensors if name.endswith("rotary_emb.freqs")]
    for name in names:
        freqs = tensors[name]
        size = values["dim_head"]
        exact, odd = (10000.0 ** (-torch.arange(0, 2 * len(freqs), 2) / each) for each in (size, size + 1))
        tolerance = 4 * torch.finfo(freqs.dtype).eps if freqs.element_size() < 4 else 1e-5
        if torch.allclose(freqs.float(), exact, rtol=tolerance, atol=0):
            if freqs.element_size() < 4:
                tensors[name] = exact
                notes = [f"rotary_emb.freqs were {freqs.dtype} and are written as float32, with all digits"]
        elif torch.allclose(freqs.float(), odd, rtol=tolerance, atol=0):
            raise ValueError(f"{name} is of a head size of {size + 1}; rotary embedding needs an even one")
        else:
            notes = ["rotary_emb.freqs are not 10000^(-2i / dim_head) and are kept as they are"]
    return notes


def _tokenizer(choice: str | None, size: int) -> Tokenizer | None:
    """That of a vocabulary of `size` tokens, or of the first of these; None: there is none."""
    if choice is None and size != ByteTokenizer.size:
        return None
    tokenizer: Tokenizer = ByteTokenizer()
    if choice not in (None, "bytes") and not (Path(choice).is_file() and holds_bytes(read_json(Path(choice)))):
        tokenizer = load_tokenizer_file(choice)
    # In a folder without a tokenizer of more, bytes are told by their number.
    if tokenizer.size > size or (tokenizer.kind == "bytes" and tokenizer.size != size):
        raise ValueError(f"--tokenizer: {choice} has {tokenizer.size:,} tokens, the model {size:,}")
    return tokenizer


def _write(
    out: Path, config: TransformerConfig, size: int, tokenizer: Tokenizer | None, tensors: dict[str, Tensor]
) -> None:
    make_folder(out)
    # What tells that this is a conversion comes first: a kill meanwhile leaves something that can be replaced.
    dtype = str(tensors["token_emb.weight"].dtype).removeprefix("torch.")
    # transformers loads into what a configuration says, or else into what it first finds.
    values = flat(config, size) | ({} if dtype == "float32" else {"dtype": dtype})
    write_text(out / CONFIG, json.dumps(values, indent=2) + "\n")
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        remove(out / name)
    if tokenizer is not None:
        tokenizer.save(out)
    write_tensors(out / MODEL, tensors, {"model": describe(config), "format": "pt"})
    sync(out)
