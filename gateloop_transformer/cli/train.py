"""The command `gateloop train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gateloop_transformer.cli.errors import check_installed
from gateloop_transformer.cli.flags import add_field, add_fields, folder, named_as_flags
from gateloop_transformer.cli.needs import needs_of, print_needs
from gateloop_transformer.cli.parser import Parser, Rare
from gateloop_transformer.cli.progress import bar, importing, say

if TYPE_CHECKING:
    from gateloop_transformer.data.tokenizer import Tokenizer
    from gateloop_transformer.runs.config import RunConfig
    from gateloop_transformer.training.loop import Trainer


HELP = "train a model on text"
DESCRIPTION = (
    "Train a language model on text, byte by byte or on BPE tokens; in one process, or under torchrun or accelerate "
    "launch on many devices. DIR gets model.safetensors, config.json, metrics.jsonl (one object a line), loss.png and "
    "checkpoints/."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    from gateloop_transformer.configuration import TransformerConfig
    from gateloop_transformer.data.documents import SOURCES
    from gateloop_transformer.runs.config import TrainingConfig
    from gateloop_transformer.runs.presets import PRESET_HELP, PRESETS

    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"{SOURCES} (default: the sources of this Python's standard library)",
    )
    parser.add_argument("--out", metavar="DIR", type=folder, help="folder of the run; not needed for --dry-run")
    parser.add_argument("--preset", default=argparse.SUPPRESS, choices=PRESETS, help=f"{PRESET_HELP} (default: tiny)")
    add_field(parser, argparse.SUPPRESS)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a tokenizer.json of byte-level BPE, as 'gateloop tokenizer train' writes (default: each byte is a token)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the run in DIR from its newest checkpoint")
    how.add_argument(
        "--resume-or-start",
        action="store_true",
        help=Rare("resume the run in DIR, or start one if there is none, so that every start of a job has one command"),
    )
    how.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would need (parameters, memory with this machine's kernels, operations, "
        "communication); start and write nothing, and do not read DATA",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help=Rare("with --dry-run: number of processes to assume (default: those of this job)"),
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_fields(parser, TrainingConfig, "training")
    add_fields(parser, TransformerConfig, "model")


def _run_config(arguments: argparse.Namespace, given: dict[str, Any]) -> Any:
    """The configuration that the flags ask for; when resuming, the stored one with the changes that are allowed."""
    from gateloop_transformer.data.sources import absolute
    from gateloop_transformer.runs import config
    from gateloop_transformer.runs.folder import read_config

    if arguments.data == "":
        raise ValueError("DATA must not be empty; leave it out for the default corpus")
    data = absolute(arguments.data)
    if "minutes" in given and "steps" in given:
        raise ValueError("give --steps or --minutes, not both")
    if not arguments.resume:
        field = given.pop("field", None)
        with named_as_flags(given):
            return dataclasses.replace(config.resolve(given.pop("preset", "tiny"), given, data), field=field)
    stored = read_config(arguments.out)
    now = {**dataclasses.asdict(stored.model), **dataclasses.asdict(stored.training), "data": stored.data}
    now["field"] = stored.field
    wanted = config.of_preset(preset, given) if (preset := given.pop("preset", None)) else given
    if data is not None and stored.data_sha256 is None:
        wanted["data"] = data
    changed = [
        f"{name} is {now[name]!r}, not {value!r}"
        for name, value in wanted.items()
        if value != now[name] and (name not in config.RESUMABLE or name not in given)
    ]
    if changed:
        raise ValueError(f"--resume: the run in {str(arguments.out)!r} has another configuration: {'; '.join(changed)}")
    again = {name: value for name, value in given.items() if name in config.RESUMABLE}
    if "steps" in again:
        again["minutes"] = None
    with named_as_flags(given):
        training = dataclasses.replace(stored.training, **again)
    if training.windows != (windows := stored.training.windows):
        raise ValueError(
            f"--resume: a step of this run has {windows} windows: --batch times --accumulate must give {windows}"
        )
    # The data may have moved; `prepare` compares its hash.
    return dataclasses.replace(stored, training=training, data=stored.data if data is None else data)


# Flags that are not part of a run's configuration.
_OWN = {"command", "data", "out", "resume", "resume_or_start", "overwrite", "json", "dry_run", "processes", "tokenizer"}


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.out is None and (arguments.resume or arguments.resume_or_start or not arguments.dry_run):
        raise ValueError("--out DIR is missing: the folder of the run")
    if arguments.processes is not None and not arguments.dry_run:
        raise ValueError("--processes goes with --dry-run")
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes must be at least 1, not {arguments.processes}")


def _tokenizer(arguments: argparse.Namespace, config: RunConfig) -> Tokenizer | None:
    """The tokenizer of --tokenizer, which must be the run's when resuming."""
    from gateloop_transformer.data.bpe import load_tokenizer_file

    if arguments.tokenizer is None:
        return None
    tokenizer = load_tokenizer_file(arguments.tokenizer)
    if arguments.resume and tokenizer.sha256 != config.tokenizer.sha256:
        raise ValueError(f"--resume: the run in {str(arguments.out)!r} has another tokenizer")
    return tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Train a model."""
    _check_flags(arguments)
    with importing("torch"):
        from gateloop_transformer.data.documents import count
        from gateloop_transformer.runs.config import TokenizerConfig, without_effect
        from gateloop_transformer.runs.weights import CONFIG
        from gateloop_transformer.training.engine import LostError, launched
        from gateloop_transformer.training.preparation import prepare

    if arguments.resume_or_start:
        arguments.resume = (arguments.out / CONFIG).exists()
    given = {name: value for name, value in vars(arguments).items() if name not in _OWN}
    config = _run_config(arguments, given)
    if os.environ.get("RANK", "0") == "0":
        for name, why in without_effect(config, given, arguments.processes or launched()).items():
            _warn(f"--{name.replace('_', '-')} has no effect: {why}")
    tokenizer = _tokenizer(arguments, config)
    if arguments.dry_run:
        if tokenizer is not None:
            config = dataclasses.replace(config, tokenizer=TokenizerConfig.of(tokenizer))
        with named_as_flags(given):
            print_needs(config, arguments.processes or launched(), arguments.json)
        return
    with importing("matplotlib"):
        check_installed()
    how = (arguments.resume, arguments.overwrite, _warn)
    with contextlib.ExitStack() as stack:
        with bar("tokenising the data") as progress, named_as_flags(given):
            trainer = stack.enter_context(prepare(config, arguments.out, *how, tokenizer, progress.update))
        main = trainer.engine.main
        stream = sys.stderr if arguments.json else sys.stdout
        if not main:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            _report(trainer, arguments.resume, stream)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(*(interrupt.args or ["continue with --resume"])) from interrupt
        except LostError as error:
            print(f"gateloop train: failed: {error}", file=sys.stderr, flush=True)
            # A regular exit would wait for the process that is gone.
            os._exit(1)
        result = trainer.result()
        unit = "bytes" if trainer.config.tokenizer.kind == "bytes" else "tokens"
    if not main:
        return
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "out": str(arguments.out)}))
        return
    print(
        f"validation: {result.bits_per_byte:.4f} bits per byte after {count(result.steps, 'step')}, "
        f"{result.tokens:,} {unit}, {result.seconds:.0f} s\n"
        f"model: {arguments.out / 'model.safetensors'}\ncurve: {arguments.out / 'loss.png'}"
    )


def _warn(text: str) -> None:
    print(f"gateloop train: warning: {text}", file=sys.stderr, flush=True)


def _report(trainer: Trainer, resumed: bool, stream: TextIO) -> None:
    """Train; print what and from where on `stream`, and progress on standard error."""
    engine, parameters = trainer.engine, trainer.result().parameters
    say(f"{trainer.corpus.description}\n{parameters:,} parameters on {engine.described()}", stream)
    say("\n".join(needs_of(trainer)), stream)
    step, options = trainer.progress.step, trainer.config.training
    if resumed:
        say(f"resumed at step {step}" if step else "no checkpoint yet: starting from step 0", stream)
    with bar("training", None if options.minutes else options.steps, "step", step) as progress:
        trainer.run(_Reporter(progress, stream))


class _Reporter:
    """A progress bar whose messages go to `stream`."""

    def __init__(self, progress: Any, stream: TextIO) -> None:
        self._stream = stream
        self.update, self.set_postfix = progress.update, progress.set_postfix

    def write(self, text: str) -> None:
        """Print a message above the bar."""
        say(text, self._stream)
