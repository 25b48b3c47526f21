"""The command `gateloop convert`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gateloop_transformer.cli.flags import folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import importing
from gateloop_transformer.waiting import waiting

HELP = "convert a checkpoint of the original package to a folder of this one"
DESCRIPTION = (
    "Read a checkpoint of the Transformer of gateloop-transformer 0.2.5 and write a folder that the other commands, "
    "load_model and Hugging Face's transformers can load. Arguments are inferred from the names and shapes of its "
    "parameters where these determine them. No code in the file is executed."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a file of torch.save or safetensors that holds a state dict, which may be nested in other dicts and may "
        "come from DDP or torch.compile; or a file of torch.save with the whole model",
    )
    parser.add_argument("--out", metavar="DIR", type=folder, required=True, help="the folder to write: new or empty")
    parser.add_argument(
        "--config",
        metavar="JSON",
        help="arguments of the original's Transformer that a checkpoint does not show, as JSON or as a JSON file, "
        "such as '{\"heads\": 8}'",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="bytes, or the model's tokenizer.json (BPE) (default: bytes if it has 256 tokens, else none)",
    )
    parser.add_argument(
        "--entry", metavar="NAME", help="the model to take from a file that holds several, such as ema_model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"inferred": {...}, "given": {...}, "assumed": {...}, "unused": {...}, "parameters": ..., '
        '"tokenizer": ..., "warnings": [...], ...}',
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint."""
    with importing("torch"):
        from gateloop_transformer.conversion.convert import convert, read_arguments

    given = {} if arguments.config is None else read_arguments(arguments.config)
    with waiting("reading the checkpoint and writing the model"):
        result = convert(
            arguments.source,
            arguments.out,
            given,
            tokenizer=arguments.tokenizer,
            entry=arguments.entry,
            overwrite=arguments.overwrite,
        )
    if arguments.json:
        print(json.dumps(result))
        return
    for warning in result["warnings"]:
        print(f"gateloop convert: {warning}", file=sys.stderr)
    print(_text(result))


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"model: {result['out']} ({result['parameters']:,} parameters, {' and '.join(result['dtypes'])})",
        f"tokenizer: {result['tokenizer'] or 'none'}",
    ]
    if result["entry"]:
        lines.append(f"from the entry: {result['entry']}")
    if result["left_out"]:
        lines.append(f"left out: {', '.join(result['left_out'])}")
    texts = {
        "inferred": "inferred from the checkpoint",
        "given": "given",
        "assumed": "assumed, since no checkpoint shows them",
    }
    for name, text in texts.items():
        if result[name]:
            values = (f"{key} {json.dumps(value)}" for key, value in result[name].items())
            lines.append(f"{text}: {', '.join(values)}")
    return "\n".join(lines)
