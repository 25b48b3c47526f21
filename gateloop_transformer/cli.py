"""The `gateloop` command: flags from dataclasses, one line for an error, no logic of its own."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import gateloop_transformer

if TYPE_CHECKING:
    from gateloop_transformer.generation import DraftReport
    from gateloop_transformer.training.loop import Trainer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _add_fields(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """One flag per field; a flag not given is absent from the namespace."""
    from gateloop_transformer.training.config import PRESETS, value_types

    preset = {name for values in PRESETS.values() for name in values}
    group = parser.add_argument_group(title)
    accepted = value_types(kind)
    for item in dataclasses.fields(kind):
        flag = "--" + item.name.replace("_", "-")
        default = PRESETS["tiny"].get(item.name, item.default)
        whose = "the preset's; tiny: " if item.name in preset else ""
        text = f"{item.metadata['help']} (default: {whose}{'none' if default is None else default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        kinds = [each for each in accepted[item.name] if each is not type(None)]
        if kinds == [bool]:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = {int: "N", float: "X", str: "WORD", bool: "BOOL"}[kinds[0]]
            convert = _boolean if kinds[0] is bool else kinds[0]
            choices = item.metadata["choices"]
            group.add_argument(flag, type=convert, choices=choices, metavar=None if choices else metavar, **options)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, not an empty text")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(_message(error)) from error
    return Path(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() == "true"


def _train_parser(commands: Any) -> None:
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
    parser.add_argument("--out", required=True, metavar="DIR", type=_folder, help="folder of the run")
    parser.add_argument("--preset", default=argparse.SUPPRESS, choices=PRESETS, help=f"{PRESET_HELP} (default: tiny)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the run in DIR from its newest checkpoint")
    how.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    _add_fields(parser, TrainingConfig, "training")
    _add_fields(parser, ModelConfig, "model")


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="continue a text with a trained model", description="Continue a text, as it is drawn."
    )
    parser.add_argument("dir", metavar="DIR", type=_folder, help="folder of a run")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue, not empty")
    parser.add_argument("--state", type=Path, metavar="FILE", help="continue what 'gateloop read' has read")
    parser.add_argument("--tokens", type=int, default=400, metavar="N", help="bytes to add (default: 400)")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="0: likeliest (default: 0.8; with --num-beams: 0)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest bytes")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the likeliest bytes that sum to X")
    parser.add_argument("--min-p", type=float, metavar="X", help="draw from bytes X times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: less repetition")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end after this text (may be repeated)")
    parser.add_argument("--seed", type=int, metavar="S", help="for the same text every time")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="search with N beams (default: 1, none)")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="of beams: above 0 for longer text (default: 1)"
    )
    parser.add_argument(
        "--draft", type=_folder, metavar="DIR", help="run of a smaller model that drafts bytes, for speed"
    )
    parser.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="bytes drafted at once (default: 4)")
    parser.add_argument(
        "--stats", action="store_true", help="say bytes per second, and how many drafted ones came, on standard error"
    )
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")
    _add_dtype(parser)


def _read_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "read",
        help="read a text of any length and keep the state",
        description="Read a text with a trained model, in bounded memory, and save the state, from which "
        "'gateloop generate --state' continues.",
    )
    parser.add_argument("dir", metavar="DIR", type=_folder, help="folder of a run")
    parser.add_argument("text", metavar="FILE", help="any file, .gz and .xz too; - for standard input")
    parser.add_argument("--state", required=True, type=Path, metavar="FILE", help="where to save the state")
    parser.add_argument("--after", type=Path, metavar="FILE", help="read on from this state, not from the start")
    parser.add_argument("--overwrite", action="store_true", help="replace the state file")
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")
    _add_dtype(parser)
    parser.add_argument("--json", action="store_true", help='print {"bytes": ..., "position": ..., "seconds": ...}')


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    from gateloop_transformer.layers.quantized import KINDS

    text = "of the weights of Linear layers, gates excepted: smaller is faster (default: float32)"
    parser.add_argument("--dtype", choices=KINDS, default="float32", help=text)


def _bench_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the speed of this machine",
        description="Time operators, layers, training steps and decoding beside peers and the memory's own speed. "
        "Writes cpu.json, cpu.md and cpu.png; rows are said on standard error as they are done.",
    )
    parser.add_argument("--out", type=_folder, default=Path("bench"), metavar="DIR", help="(default: bench)")
    parser.add_argument("--quick", action="store_true", help="a few minutes: shorter sequences")
    parser.add_argument(
        "--only", action="append", default=[], metavar="GROUP", help="a group of cases (may be repeated)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, metavar="X", help="for each case (default: 4)")
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", help="interpreter with the original 0.2.5, mambapy and transformers"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, not as a table")


def _eval_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="bits per byte of a trained model on any text",
        description="Bits per byte, each file read once from start to end with the state carried along.",
    )
    parser.add_argument("dir", metavar="DIR", type=_folder, help="folder of a run")
    parser.add_argument("data", metavar="DATA", help="a text file, a folder, a glob, or .gz or .xz files")
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")
    _add_dtype(parser)
    parser.add_argument("--json", action="store_true", help='print {"bits_per_byte": ..., "bytes": ...}')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gateloop", description="Train, run and evaluate GateLoop language models.")
    parser.add_argument("--version", action="version", version=f"gateloop {gateloop_transformer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _train_parser(commands)
    _generate_parser(commands)
    _read_parser(commands)
    _eval_parser(commands)
    _bench_parser(commands)
    return parser


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


def _train(arguments: argparse.Namespace) -> None:
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


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from gateloop_transformer.generation import DraftReport
    from gateloop_transformer.layers.quantized import quantize
    from gateloop_transformer.training.checkpoint import load_model, pick_device
    from gateloop_transformer.training.reading import load_reading, model_digest

    if arguments.tokens < 0:
        raise ValueError(f"--tokens must be 0 or more, not {arguments.tokens}")
    device = pick_device(arguments.device)
    if arguments.prompt is None and arguments.state is None:
        raise ValueError("give a --prompt, a --state, or both")
    prompt = os.fsencode(arguments.prompt or "")
    if not prompt and arguments.state is None:
        raise ValueError("--prompt must not be empty; a newline starts from next to nothing")
    model = quantize(load_model(arguments.dir), arguments.dtype).to(device)
    before, state = b"", None
    if arguments.state is not None:
        reading = load_reading(arguments.state, model_digest(arguments.dir, arguments.dtype))
        before, state = bytes([reading.last]), reading.state
    ids = torch.tensor([list(before + prompt)], device=device)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in _SAMPLING}
    options["state"] = None if state is None else state.to(device)
    options["stop"] = [list(os.fsencode(text)) for text in arguments.stop or []]
    beams = arguments.num_beams != 1
    if arguments.temperature is None and not beams:
        options["temperature"] = 0.8
    report = DraftReport()
    if arguments.draft is not None:
        draft = quantize(load_model(arguments.draft), arguments.dtype).to(device)
        options.update(draft=draft, draft_tokens=arguments.draft_tokens, draft_report=report)
    start = time.perf_counter()
    steps: Iterable[Any]
    if beams:
        beam = {"num_beams": arguments.num_beams, "length_penalty": arguments.length_penalty}
        steps = model.generate(ids, arguments.tokens, **options, **beam)[0, ids.shape[1] :]
    else:
        steps = model.stream(ids, arguments.tokens, **options)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(decoder.decode(prompt))
    count = 0
    for token in steps:
        sys.stdout.write(decoder.decode(bytes([int(token)])))
        sys.stdout.flush()
        count += 1
    seconds = time.perf_counter() - start
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()
    if arguments.stats:
        print(_stats(count, seconds, report if arguments.draft is not None else None), file=sys.stderr)


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _stats(count: int, seconds: float, report: DraftReport | None) -> str:
    """One line about a generation, the prompt's reading included."""
    speed = f"{count:,} bytes in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} bytes/s"
    if report is None:
        return speed
    return f"{speed}; {report.accepted:,} of {report.drafted:,} drafted bytes accepted ({report.rate:.0%})"


def _bar(total: int) -> Any:
    """A progress bar in bytes where there is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


class _NoBar(contextlib.nullcontext["_NoBar"]):
    def __enter__(self) -> _NoBar:
        return self

    def update(self, _count: int) -> None:
        """Nothing to show."""


def _read(arguments: argparse.Namespace) -> None:
    from gateloop_transformer.layers.quantized import quantize
    from gateloop_transformer.training.checkpoint import load_model, pick_device
    from gateloop_transformer.training.data import count
    from gateloop_transformer.training.reading import load_reading, model_digest, open_text, read, save_reading

    path = arguments.state
    if path.is_dir():
        raise ValueError(f"--state: {str(path)!r} is a folder, not a file")
    same = arguments.after is not None and path.resolve() == arguments.after.resolve()
    if path.exists() and not (arguments.overwrite or same):
        raise ValueError(f"{str(path)!r} already exists: replace it with --overwrite")
    device = pick_device(arguments.device)
    model = quantize(load_model(arguments.dir), arguments.dtype).to(device)
    digest = model_digest(arguments.dir, arguments.dtype)
    start = None if arguments.after is None else load_reading(arguments.after, digest)
    if start is not None and start.state is not None:
        start = start._replace(state=start.state.to(device))
    size = os.path.getsize(arguments.text) if os.path.isfile(arguments.text) else 0
    began = time.perf_counter()
    with open_text(arguments.text) as text, _bar(size) as bar:
        reading = read(model, text, start, bar.update)
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


def _eval(arguments: argparse.Namespace) -> None:
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
    with _bar(size) as bar:
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


def _bench(arguments: argparse.Namespace) -> None:
    from gateloop_transformer.bench.report import markdown, run

    if not arguments.seconds >= 0:
        raise ValueError(f"--seconds must be 0 or more, not {arguments.seconds}")
    results = run(arguments.out, arguments.peers, arguments.quick, arguments.only, arguments.seconds)
    print(json.dumps(results) if arguments.json else markdown(results))


def _message(error: Exception) -> str:
    """What went wrong, in one line and without an error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed) or 2 (something wrong was passed)."""
    # See docs/decisions/0005: read when torch is first imported, and whoever has set either decides.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    if sys.stderr is None:
        # Closed by the caller: nothing can be said to it, and it must not go to standard output instead.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    arguments = _parser().parse_args(argv)
    if sys.stdout is None:
        print(f"gateloop {arguments.command}: error: standard output is closed; send it to /dev/null", file=sys.stderr)
        return 2
    run = {"train": _train, "generate": _generate, "read": _read, "eval": _eval, "bench": _bench}[arguments.command]
    try:
        run(arguments)
    except (ValueError, PermissionError, FileExistsError, NotADirectoryError) as error:
        print(f"gateloop {arguments.command}: error: {_message(error)}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, MemoryError, OverflowError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader went away; nothing more can be said to it, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"gateloop {arguments.command}: failed: {_message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        hint = "; ".join(["interrupted", *interrupt.args])
        print(f"\ngateloop {arguments.command}: {hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
