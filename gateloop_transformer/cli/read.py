"""The command `gateloop read`."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from gateloop_transformer.cli import models
from gateloop_transformer.cli.flags import add_checkpoint, add_device, add_dtype, folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import bar, importing

HELP = "read a text of any length and keep the state"
DESCRIPTION = (
    "Read a text with a trained model, in bounded memory, and save the state; 'gateloop generate --state' continues "
    "from it."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    parser.add_argument("text", metavar="FILE", help="any file, also .gz, .xz or .zst; - for standard input")
    parser.add_argument(
        "--state", required=True, type=Path, metavar="FILE", help="where to save the state; may be the file of --after"
    )
    parser.add_argument("--after", type=Path, metavar="FILE", help="continue from this state instead of from the start")
    parser.add_argument("--overwrite", action="store_true", help="replace the state file")
    add_device(parser)
    add_dtype(parser)
    add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help='print {"bytes": ..., "position": ..., "seconds": ...}')


def run(arguments: argparse.Namespace) -> None:
    """Read a text."""
    path = arguments.state
    if path.is_dir():
        raise ValueError(f"--state: {str(path)!r} is a folder, not a file")
    if not path.parent.is_dir():
        raise ValueError(f"--state: there is no folder {str(path.parent)!r}")
    same = arguments.after is not None and path.resolve() == arguments.after.resolve()
    if path.exists() and not (arguments.overwrite or same):
        raise ValueError(f"{str(path)!r} already exists: replace it with --overwrite")
    with importing("torch"):
        from gateloop_transformer.data.documents import count
        from gateloop_transformer.data.files import is_packed
        from gateloop_transformer.evaluation.reading import load_reading, model_digest, read, save_reading, text_blocks
        from gateloop_transformer.runs.checkpoint import weights_file
        from gateloop_transformer.runs.folder import load_tokenizer, pick_device

    device = pick_device(arguments.device)
    weights = weights_file(arguments.dir, arguments.checkpoint)
    model = models.load(arguments.dir, weights, arguments.device, arguments.dtype)
    digest = model_digest(weights, arguments.dtype)
    start = None if arguments.after is None else load_reading(arguments.after, digest)
    if start is not None and start.state is not None:
        start = start._replace(state=start.state.to(device))
    known = os.path.isfile(arguments.text) and not is_packed(Path(arguments.text))
    size = os.path.getsize(arguments.text) if known else None
    began = time.perf_counter()
    text = text_blocks(arguments.text)
    with bar("reading", size) as progress:
        reading = read(model, text, start, progress.update, load_tokenizer(arguments.dir))
    seconds = time.perf_counter() - began
    save_reading(reading, path, digest)
    new = reading.position - (0 if start is None else start.position)
    if arguments.json:
        print(json.dumps({"bytes": new, "position": reading.position, "seconds": seconds, "state": str(path)}))
    else:
        after = "" if start is None else f", {reading.position:,} in all"
        print(
            f"read {count(new, 'byte')}{after} in {seconds:.1f} s ({new / max(seconds, 1e-9):,.0f} bytes/s)\n"
            f"state: {path} ({os.path.getsize(path):,} bytes)"
        )
