"""The command `gateloop plot`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gateloop_transformer.cli.flags import folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.waiting import waiting

HELP = "draw the loss of runs against tokens, time and steps"
DESCRIPTION = (
    "Draw training losses (smoothed) and validation losses of one or several runs, finished or still going, in bits "
    "per byte."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=folder, help="folder of a run")
    parser.add_argument(
        "--out", type=folder, default=Path("curves.png"), metavar="FILE.png", help="file to draw (default: curves.png)"
    )
    parser.add_argument(
        "--against",
        choices=("tokens", "time", "steps", "all"),
        default="all",
        help="what the horizontal axis shows (default: all, one panel each)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"out": ..., "runs": [...]}: how far each run has come, and its losses',
    )


def run(arguments: argparse.Namespace) -> None:
    """Plot runs."""
    from gateloop_transformer.runs.curves import AGAINST, read_curves, summary
    from gateloop_transformer.runs.plot import check_png, draw_curves

    check_png(arguments.out)
    with waiting("reading the runs"):
        curves = read_curves(arguments.runs)
    with waiting("drawing"):
        draw_curves(curves, arguments.out, AGAINST if arguments.against == "all" else (arguments.against,))
    rows = [summary(curve) for curve in curves]
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "runs": rows}))
        return
    for row in rows:
        valid = row["bits_per_byte"]
        said = "no validation yet" if valid is None else f"{valid:.4f} bits per byte on validation data"
        print(f"{row['run']}: {said} after {row['steps']:,.0f} steps")
    print(f"curves: {arguments.out}")
