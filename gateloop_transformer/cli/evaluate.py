"""gateloop eval."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from gateloop_transformer.cli.flags import add_dtype, bytes_bar, folder


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="bits per byte of a trained model on any text",
        description="Bits per byte, each file read once from start to end with the state carried along.",
    )
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    parser.add_argument("data", metavar="DATA", help="a text file, a folder, a glob, or .gz or .xz files")
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")
    add_dtype(parser)
    parser.add_argument("--json", action="store_true", help='print {"bits_per_byte": ..., "bytes": ...}')


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from gateloop_transformer.layers.quantized import quantize
    from gateloop_transformer.training.checkpoint import load_model, pick_device
    from gateloop_transformer.training.data import count, read_documents
    from gateloop_transformer.training.evaluation import bits_per_byte

    documents, skipped = read_documents(arguments.data, binary=True)
    short = [document.name for document in documents if len(document.content) < 2]
    if short:
        raise ValueError(f"{short[0]!r} is too short: evaluation needs at least 2 bytes a file")
    model = quantize(load_model(arguments.dir), arguments.dtype).to(pick_device(arguments.device))
    size = sum(len(document.content) for document in documents)
    total = 0.0
    with bytes_bar(size) as bar:
        for document in documents:
            data = np.frombuffer(document.content, dtype=np.uint8)
            total += bits_per_byte(model, data, report=bar.update) * (len(data) - 1)
    result = {"bits_per_byte": total / (size - len(documents)), "bytes": size, "files": len(documents)}
    if skipped:
        print(f"gateloop eval: {count(skipped, 'empty file')} left out", file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['bits_per_byte']:.4f} bits per byte over {size:,} bytes in {count(len(documents), 'file')}")
