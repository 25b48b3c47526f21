"""Writes a model as ONNX files: one that reads a token, one that reads a block, and a description of both."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gateloop_transformer.arguments import check_release
from gateloop_transformer.decoding.decoder import evaluating
from gateloop_transformer.export.onnx_runtime import DESCRIPTION, FORMAT, PROMPT, STEP
from gateloop_transformer.export.plain import PlainOperators
from gateloop_transformer.export.states import Part, Reader, check_model, dimension, mixers
from gateloop_transformer.files import aside, digest, make_folder, sync_whole, write_text
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.model import Transformer
from gateloop_transformer.waiting import waiting

OPSET = 20
FILES = (STEP, PROMPT, DESCRIPTION)


def export_onnx(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    block: int = 64,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write step.onnx, prompt.onnx and model.json, for `OnnxGenerator` or any other runtime for ONNX.

    step.onnx reads one token, ids (B, 1), and prompt.onnx `block` of them, ids (B, block): from ids and the state's
    tensors, in the order of model.json, to logits (B, 1 or block, vocabulary) and the new state's tensors. A prompt is
    read in blocks and what is left of it token by token, so its length is free; so is B. The state starts as zeros.
    All is float32 (complex numbers are pairs of real tensors) but ids and attention's step count, which are int64, and
    made of ONNX's own operators. Each file has all weights; beyond 2 GB they stand in a file beside it.

    Args:
        model: a `Transformer` in float32; it stays as it is.
        folder: the folder to write to; it is made if it does not exist.
        block: tokens that prompt.onnx reads at a time, at least 2.
        tokenizer: kind of tokenizer, "bytes" or "bpe", for model.json.
        overwrite: replace the files of an earlier export.

    Returns:
        The content of model.json.

    Raises:
        ValueError: the model is not a float32 `Transformer` or is quantized, block is below 2, a file already exists,
            onnx or onnxscript is not installed, or torch is too old.
        OSError: the files cannot be written.
    """
    check_model("export_onnx", model)
    other = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if other:
        raise ValueError(f"export_onnx: the model must be in float32, not {other.pop()}: convert it with model.float()")
    if block < 2:
        raise ValueError(f"export_onnx: block must be at least 2 tokens, not {block}")
    with waiting("importing onnx"):
        _check_installed()
    path = Path(folder)
    check_free(path, overwrite, "overwrite=True")
    check_release("export_onnx", "torch", torch.__version__, "2.7")
    make_folder(path)
    reader = Reader(model)
    with aside(path / "onnx") as new, evaluating(model):
        new.mkdir()
        for name, length in ((STEP, 1), (PROMPT, block)):
            with waiting(f"tracing and translating {name}"):
                _translated(reader, length).save(str(new / name))
        sync_whole(new)
        written = sorted(new.iterdir())
        description = _description(model, reader.parts, block, tokenizer)
        description["files"] = {file.name: digest(file) for file in written}
        for file in written:
            os.replace(file, path / file.name)
    write_text(path / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return description


def check_free(folder: Path, overwrite: bool, how: str) -> None:
    """Check that the files of an export do not exist or may be replaced; `how` names the option that replaces them.

    Raises:
        ValueError: a file exists and may not be replaced, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, not a folder")
    for name in FILES:
        if (folder / name).is_dir():
            raise ValueError(f"{str(folder / name)!r} is a folder, not a file: choose another folder")
        if (folder / name).exists() and not overwrite:
            raise ValueError(f"{str(folder / name)!r} already exists: replace it with {how}")


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; `pip install gateloop-transformer[export]`") from error


def _translated(reader: Reader, length: int) -> Any:
    """Translate a model to the ONNX program that reads `length` tokens."""
    # Sizes of 0 and 1 would be taken for constants.
    ids = torch.zeros(2, length, dtype=torch.int64, device=reader.model.token_emb.weight.device)
    given = [
        torch.zeros(2, *(3 if size is None else size for size in part.shape), dtype=part.dtype, device=ids.device)
        for part in reader.parts
    ]
    batch, past = dimension("batch", 1), dimension("past", 0)
    growing = [{n: past for n, size in enumerate(part.shape, 1) if size is None} for part in reader.parts]
    shapes = {"ids": {0: batch}, "given": tuple({0: batch, **more} for more in growing)}
    with PlainOperators():
        program = torch.export.export(reader, (ids, *given), dynamic_shapes=shapes)
    names = [part.name for part in reader.parts]
    with _quiet():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            # onnxruntime optimises as well when it loads a file, in a hundredth of the time.
            optimize=False,
            opset_version=OPSET,
            input_names=["ids", *names],
            output_names=["logits", *(f"{name}.next" for name in names)],
            dynamic_shapes=_axis_names(growing),
        )
    return _tidied(translated)


def _axis_names(growing: list[dict[int, Any]]) -> dict[str, Any]:
    """Name each axis only where it occurs first, because the exporter warns of a name that is given twice."""
    first = next((n for n, axes in enumerate(growing) if axes), None)
    given = tuple(dict.fromkeys(axes, "past") if n == first else {} for n, axes in enumerate(growing))
    return {"ids": {0: "batch"}, "given": given}


def _tidied(program: Any) -> Any:
    """Fold constants, merge repeated computations, and drop traces of where the code stood."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    fold_constants(program.model)
    remove_unused_nodes(program.model)
    CommonSubexpressionEliminationPass()(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()
    return program


def _description(model: Transformer, parts: list[Part], block: int, tokenizer: str | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "block": block,
        "vocabulary": model.num_tokens,
        "tokenizer": tokenizer,
        "opset": OPSET,
        "layers": ["gate" if isinstance(mixer, GateLoopedAttention) else "attention" for mixer in mixers(model)],
        "state": [
            {
                "name": part.name,
                "shape": ["batch", *("past" if size is None else size for size in part.shape)],
                "dtype": str(part.dtype).removeprefix("torch."),
            }
            for part in parts
        ],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's logs about operators of torchvision, and torch's warnings about its own code."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def other(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger.addFilter(other)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(other)
