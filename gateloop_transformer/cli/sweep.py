"""The command `gateloop sweep`."""

from __future__ import annotations

import argparse
import json
import sys

from gateloop_transformer.cli.errors import check_installed
from gateloop_transformer.cli.flags import add_field, add_fields, folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import importing

HELP = "train with every combination of some settings"
DESCRIPTION = (
    "Train one run after the other, each in DIR/NAME, with every combination of the grid's values. The same command "
    "again continues where it stopped. DIR gets results.json, curves.png, lr.png and logs."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    from gateloop_transformer.configuration import TransformerConfig
    from gateloop_transformer.runs.config import TrainingConfig
    from gateloop_transformer.runs.presets import PRESET_HELP, PRESETS

    parser.add_argument("data", nargs="?", metavar="DATA", help="as for gateloop train")
    parser.add_argument("--out", required=True, metavar="DIR", type=folder, help="folder of the sweep")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=X,Y,...",
        help="a setting of gateloop train and its values (may be repeated)",
    )
    parser.add_argument("--seeds", metavar="N,N,...", help="the same as --grid seed=N,N,...")
    parser.add_argument("--preset", default=argparse.SUPPRESS, choices=PRESETS, help=f"{PRESET_HELP} (default: tiny)")
    add_field(parser, argparse.SUPPRESS)
    parser.add_argument("--tokenizer", default=argparse.SUPPRESS, metavar="FILE", help="as for gateloop train")
    parser.add_argument("--json", action="store_true", help='print {"rows": [...]}, the best run first')
    add_fields(parser, TrainingConfig, "training, for all runs")
    add_fields(parser, TransformerConfig, "model, for all runs")


def run(arguments: argparse.Namespace) -> None:
    """Run a sweep."""
    with importing("torch"):
        from gateloop_transformer.training import sweep

        check_installed()
    own = {"command", "data", "out", "grid", "seeds", "json"}
    settings = {name: value for name, value in vars(arguments).items() if name not in own}
    plan = sweep.Sweep(
        arguments.out, sweep.data_of(arguments.data), settings, sweep.parse_grid(arguments.grid, arguments.seeds)
    )
    say = sys.stderr if arguments.json else sys.stdout
    rows = sweep.run(plan, lambda line: print(line, file=say))
    if arguments.json:
        print(json.dumps({"rows": sweep.ranked(rows)}))
    else:
        print(f"\n{sweep.table(rows)}\nresults: {arguments.out / sweep.RESULTS}")
    failed = [row["name"] for row in rows if row["status"] == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} runs failed: {'; '.join(failed)}")
