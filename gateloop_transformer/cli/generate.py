"""The command `gateloop generate`."""

from __future__ import annotations

import argparse
import codecs
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli import models
from gateloop_transformer.cli.flags import add_checkpoint, add_device, add_dtype, folder, named_as_flags, typed
from gateloop_transformer.cli.parser import Parser, Rare
from gateloop_transformer.cli.progress import importing
from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    from gateloop_transformer.data.tokenizer import Tokenizer
    from gateloop_transformer.generation import DraftReport


HELP = "continue a text with a trained model"
DESCRIPTION = "Continue a text; tokens are printed as they are drawn."
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue, not empty")
    parser.add_argument("--state", type=Path, metavar="FILE", help="continue what 'gateloop read' has read")
    parser.add_argument(
        "--tokens",
        type=int,
        default=400,
        metavar="N",
        help="number of tokens to add; they are bytes unless the model was trained with a tokenizer (default: 400)",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="0 takes the likeliest token (default: 0.8; with --num-beams: 0)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the likeliest tokens that sum to X")
    parser.add_argument(
        "--min-p", type=float, metavar="X", help=Rare("draw from tokens at least X times as likely as the likeliest")
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help=Rare("above 1 gives less repetition (default: 1)"),
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end after this text (may be repeated)")
    parser.add_argument("--seed", type=int, metavar="S", help="seed: the same one gives the same text")
    parser.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="search with N beams (default: 1, no search)"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help=Rare("with --num-beams: above 0 prefers longer text (default: 1)"),
    )
    parser.add_argument(
        "--draft", type=folder, metavar="DIR", help="run of a smaller model that drafts tokens, for speed"
    )
    parser.add_argument(
        "--draft-tokens", type=int, default=4, metavar="K", help=Rare("tokens drafted at once (default: 4)")
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        help=Rare("print tokens per second and the accepted share of drafted tokens on standard error"),
    )
    add_device(parser)
    add_dtype(parser)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> None:
    """Generate text."""
    with named_as_flags([*_SAMPLING, "num_beams", "length_penalty", "draft_tokens"]):
        _generate(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.tokens < 0:
        raise ValueError(f"--tokens must be 0 or more, not {arguments.tokens}")
    if arguments.prompt is None and arguments.state is None:
        raise ValueError("give a --prompt, a --state, or both")
    prompt = typed(arguments.prompt or "")
    if not prompt and arguments.state is None:
        raise ValueError("--prompt must not be empty; a newline starts from next to nothing")
    if "" in (arguments.stop or []):
        raise ValueError("--stop must not be empty")
    with importing("torch"):
        import torch

        from gateloop_transformer.evaluation.reading import load_reading, model_digest
        from gateloop_transformer.generation import DraftReport
        from gateloop_transformer.runs.checkpoint import weights_file
        from gateloop_transformer.runs.folder import load_tokenizer, pick_device

    device = pick_device(arguments.device)
    tokenizer = load_tokenizer(arguments.dir)
    weights = weights_file(arguments.dir, arguments.checkpoint)
    model = models.load(arguments.dir, weights, arguments.device, arguments.dtype)
    before, state = [], None
    if arguments.state is not None:
        reading = load_reading(arguments.state, model_digest(weights, arguments.dtype))
        before, state = [reading.last], reading.state
    ids = torch.tensor([before + tokenizer.encode(prompt).tolist()], device=device)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in _SAMPLING}
    options["state"] = None if state is None else state.to(device)
    beams = arguments.num_beams != 1
    stops = [typed(text) for text in arguments.stop or []]
    options["stop"] = _stop_tokens(tokenizer, stops, beams)
    if arguments.temperature is None and not beams:
        options["temperature"] = 0.8
    report = DraftReport()
    if arguments.draft is not None:
        if load_tokenizer(arguments.draft).sha256 != tokenizer.sha256:
            raise ValueError(f"--draft: {str(arguments.draft)!r} has another tokenizer than {str(arguments.dir)!r}")
        draft = models.load(arguments.draft, None, arguments.device, arguments.dtype)
        options.update(draft=draft, draft_tokens=arguments.draft_tokens, draft_report=report)
    start = time.perf_counter()
    steps: Iterable[Any]
    if beams:
        beam = {"num_beams": arguments.num_beams, "length_penalty": arguments.length_penalty}
        with waiting(f"searching with {arguments.num_beams} beams"):
            steps = model.generate(ids, arguments.tokens, **options, **beam)[0, ids.shape[1] :]
    else:
        steps = model.stream(ids, arguments.tokens, **options)
    count = _write(prompt, (tokenizer.pieces[int(token)] for token in steps), stops)
    seconds = time.perf_counter() - start
    if arguments.stats:
        unit = "bytes" if tokenizer.kind == "bytes" else "tokens"
        print(_stats(count, unit, seconds, report if arguments.draft is not None else None), file=sys.stderr)


def _stop_tokens(tokenizer: Tokenizer, stops: list[bytes], beams: bool) -> list[list[int]]:
    """The tokens that end a generation: those of `stops` where each token is a byte; else `_write` finds these texts.

    Raises:
        ValueError: beam search cannot find a stop.
    """
    if tokenizer.kind == "bytes":
        return [list(stop) for stop in stops]
    if stops and beams:
        raise ValueError("--stop with --num-beams needs a model of bytes: a text can be cut into tokens in many ways")
    return [[tokenizer.end]] if tokenizer.end is not None else []


def _write(prompt: bytes, pieces: Iterable[bytes], stops: list[bytes]) -> int:
    """Print the prompt and what follows, up to the first of the texts in `stops`; returns the number of pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(decoder.decode(prompt))
    sys.stdout.flush()
    longest, tail, count = max(map(len, stops), default=1), b"", 0
    pieces = iter(pieces)
    with waiting("reading the prompt"):
        first = list(itertools.islice(pieces, 1))
    for piece in itertools.chain(first, pieces):
        count += 1
        text = tail + piece
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        sys.stdout.write(decoder.decode(text[len(tail) : min(ends, default=len(text))]))
        sys.stdout.flush()
        if ends:
            break
        tail = text[max(0, len(text) - longest + 1) :]
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()
    return count


def _stats(count: int, unit: str, seconds: float, report: DraftReport | None) -> str:
    """Describe a generation in one line; the time includes reading the prompt."""
    speed = f"{count:,} {unit} in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} {unit}/s"
    if report is None:
        return speed
    return f"{speed}; {report.accepted:,} of {report.drafted:,} drafted {unit} accepted ({report.rate:.0%})"
