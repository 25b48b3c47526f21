"""gateloop train."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from gateloop_transformer.cli.flags import add_fields, folder

if TYPE_CHECKING:
    from gateloop_transformer.training.loop import Trainer


def add_parser(commands: Any) -> None:
    from gateloop_transformer.training.config import PRESET_HELP, PRESETS, ModelConfig, TrainingConfig

    parser = commands.add_parser(
        "train",
        help="train a model on text, byte by byte",
        description="Train a language model on the bytes of text. DIR gets model.safetensors, config.json, "
        "metrics.jsonl (one object a line), loss.png and checkpoints/.",
    )
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="a text file, a folder (read recursively), a glob in quotes, or .gz or .xz files "
        "(default: the sources of this Python's standard library)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=folder, help="folder of the run")
    parser.add_argument("--preset", default=argparse.SUPPRESS, choices=PRESETS, help=f"{PRESET_HELP} (default: tiny)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the run in DIR from its newest checkpoint")
    how.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_fields(parser, TrainingConfig, "training")
    add_fields(parser, ModelConfig, "model")


def _run_config(arguments: argparse.Namespace, given: dict[str, Any]) -> Any:
    """The configuration that the flags ask for; when resuming, the stored one with what may change."""
    from gateloop_transformer.training import checkpoint, config, loop

    if arguments.data == "":
        raise ValueError("DATA must not be empty; leave it out for the default corpus")
    data = None if arguments.data is None else os.path.abspath(arguments.data)
    if "minutes" in given and "steps" in given:
        raise ValueError("give --steps or --minutes, not both")
    if not arguments.resume:
        return config.resolve(given.pop("preset", "tiny"), given, data)
    stored = checkpoint.read_config(arguments.out)
    now = {**dataclasses.asdict(stored.model), **dataclasses.asdict(stored.training), "data": stored.data}
    wanted = {**config.PRESETS.get(given.pop("preset", ""), {}), **given}
    if data is not None and stored.data_sha256 is None:
        wanted["data"] = data
    changed = [
        f"{name} is {now[name]!r}, not {value!r}"
        for name, value in wanted.items()
        if value != now[name] and (name not in loop.RESUMABLE or name not in given)
    ]
    if changed:
        raise ValueError(f"--resume: the run in {str(arguments.out)!r} has another configuration: {'; '.join(changed)}")
    again = {name: value for name, value in given.items() if name in loop.RESUMABLE}
    if "steps" in again:
        again["minutes"] = None
    training = dataclasses.replace(stored.training, **again)
    # Data may have moved; `prepare` compares its hash.
    return dataclasses.replace(stored, training=training, data=stored.data if data is None else data)


def run(arguments: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; `pip install gateloop-transformer[train]`") from error
    from gateloop_transformer.training.data import count
    from gateloop_transformer.training.loop import prepare

    own = {"command", "data", "out", "resume", "overwrite", "json"}
    given = {name: value for name, value in vars(arguments).items() if name not in own}
    config = _run_config(arguments, given)
    with prepare(config, arguments.out, arguments.resume, arguments.overwrite) as trainer:
        try:
            _report(trainer, arguments.resume, sys.stderr if arguments.json else sys.stdout)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt("continue with --resume") from interrupt
        result = trainer.result()
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "out": str(arguments.out)}))
        return
    print(
        f"validation: {result.bits_per_byte:.4f} bits per byte after {count(result.steps, 'step')}, "
        f"{result.tokens:,} bytes, {result.seconds:.0f} s\n"
        f"model: {arguments.out / 'model.safetensors'}\ncurve: {arguments.out / 'loss.png'}"
    )


def _report(trainer: Trainer, resumed: bool, say: TextIO) -> None:
    """Train, saying on `say` what and from where, with a bar on a terminal."""
    from tqdm import tqdm

    parameters = trainer.result().parameters
    print(f"{trainer.corpus.description}\n{parameters:,} parameters on {trainer.device}", file=say, flush=True)
    step, options = trainer.progress.step, trainer.config.training
    if resumed:
        where = f"resumed at step {step}" if step else "no checkpoint yet: starting from step 0"
        print(where, file=say, flush=True)
    total = None if options.minutes else options.steps
    with tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True) as bar:
        trainer.run(_Reporter(bar, say))


class _Reporter:
    """A tqdm bar whose messages go to the stream for messages."""

    def __init__(self, bar: Any, stream: Any) -> None:
        self.bar, self.stream = bar, stream
        self.update, self.set_postfix = bar.update, bar.set_postfix

    def write(self, text: str) -> None:
        """A message above the bar."""
        self.bar.write(text, file=self.stream)
        self.stream.flush()
