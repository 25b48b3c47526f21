"""The command `gateloop export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gateloop_transformer.cli import models
from gateloop_transformer.cli.flags import add_checkpoint, folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import importing
from gateloop_transformer.waiting import waiting

HELP = "write a model for Hugging Face, onnxruntime or torch.export"
DESCRIPTION = (
    "Write a trained model for use elsewhere. hf: a folder for transformers with a model card, to publish. onnx: "
    "step.onnx reads a token, prompt.onnx a block of tokens, and model.json says what they need. torch: model.pt2, a "
    "program of torch.export."
)
_PROGRAM = "model.pt2"


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    parser.add_argument("--format", required=True, choices=("hf", "onnx", "torch"), help="format to write")
    parser.add_argument("--out", required=True, type=folder, metavar="OUT", help="folder for the files")
    parser.add_argument(
        "--block", type=int, metavar="N", help="onnx: tokens of a prompt to read at a time (default: 64)"
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="torch: use only torch's own operators, so that the program runs without this package",
    )
    parser.add_argument("--overwrite", action="store_true", help="onnx, torch: replace files of an earlier export")
    add_checkpoint(parser, "onnx, torch: ")
    parser.add_argument("--json", action="store_true", help='print {"out": ..., "files": {NAME: bytes, ...}, ...}')


def run(arguments: argparse.Namespace) -> None:
    """Export a model."""
    _check_flags(arguments)
    with importing("torch"):
        from gateloop_transformer.runs.checkpoint import weights_file
        from gateloop_transformer.runs.folder import load_tokenizer

    out: Path = arguments.out
    if arguments.format == "hf":
        _publish(arguments.dir, out, arguments.json)
        return
    tokenizer = load_tokenizer(arguments.dir)
    model = models.load(arguments.dir, weights_file(arguments.dir, arguments.checkpoint))
    result: dict[str, Any] = {"out": str(out), "format": arguments.format, "tokenizer": tokenizer.kind}
    if arguments.format == "onnx":
        from gateloop_transformer.export.onnx import check_free, export_onnx
        from gateloop_transformer.export.onnx_runtime import DESCRIPTION

        check_free(out, arguments.overwrite, "--overwrite")
        block = 64 if arguments.block is None else arguments.block
        description = export_onnx(model, out, block=block, tokenizer=tokenizer.kind, overwrite=True)
        result["block"], names = block, [*description["files"], DESCRIPTION]
    else:
        _write_program(model, out, arguments.portable, arguments.overwrite)
        result["portable"], names = arguments.portable, [_PROGRAM]
    result["files"] = {name: (out / name).stat().st_size for name in names}
    if arguments.json:
        print(json.dumps(result))
        return
    for name, size in result["files"].items():
        print(f"{out / name}: {size:,} bytes")


def _check_flags(arguments: argparse.Namespace) -> None:
    """Check that the flags fit the format.

    Raises:
        ValueError: one does not.
    """
    if arguments.format != "onnx" and arguments.block is not None:
        raise ValueError("--block is for --format onnx: the others read any length")
    if arguments.format != "torch" and arguments.portable:
        raise ValueError("--portable is for --format torch: the others need nothing of this package, or all of it")
    if arguments.format == "hf" and (arguments.overwrite or arguments.checkpoint != "last"):
        raise ValueError("--format hf writes the run's model into a new folder: leave out --overwrite and --checkpoint")


def _publish(run: Path, out: Path, as_json: bool) -> None:
    try:
        with importing("transformers"):
            from gateloop_transformer.huggingface import export
    except ImportError as error:
        raise ValueError(str(error)) from error
    with waiting("writing the model and its card"):
        export(run, out)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    if as_json:
        print(json.dumps({"out": str(out), "format": "hf", "files": files}))
        return
    for name, size in files.items():
        print(f"{out / name}: {size:,} bytes")


def _write_program(model: Any, out: Path, portable: bool, overwrite: bool) -> None:
    import torch

    from gateloop_transformer.export.program import export_program
    from gateloop_transformer.files import make_folder, replacing

    path = out / _PROGRAM
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {str(out)!r} is a file, not a folder")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, not a file: choose another folder")
    if path.exists() and not overwrite:
        raise ValueError(f"{str(path)!r} already exists: replace it with --overwrite")
    make_folder(out)
    with waiting("tracing the model"):
        program = export_program(model, portable=portable)
    # The file is opened here, because torch takes only names that are UTF-8.
    with replacing(path) as other, other.open("wb") as file:
        torch.export.save(program, file)
