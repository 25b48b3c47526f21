"""The command `gateloop bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gateloop_transformer.cli.flags import folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import importing

HELP = "measure the speed of this machine"
DESCRIPTION = (
    "Time operators, layers, training steps and decoding, next to peers and the speed of memory. Writes cpu.json, "
    "cpu.md and cpu.png; each row is printed on standard error when it is done."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--out", type=folder, default=Path("bench"), metavar="DIR", help="folder for the results (default: bench)"
    )
    parser.add_argument("--quick", action="store_true", help="use shorter sequences: takes a few minutes")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GROUP",
        help="measure only this group of cases (may be repeated)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, metavar="X", help="time for each case (default: 4)")
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", help="interpreter with the original 0.2.5, mambapy and transformers"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, not as a table")


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the results."""
    if not arguments.seconds >= 0:
        raise ValueError(f"--seconds must be 0 or more, not {arguments.seconds}")
    with importing("torch"):
        from gateloop_transformer.bench.report import markdown, run

    results = run(arguments.out, arguments.peers, arguments.quick, arguments.only, arguments.seconds)
    print(json.dumps(results) if arguments.json else markdown(results))
