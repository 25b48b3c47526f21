"""gateloop generate."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli.flags import add_dtype, folder

if TYPE_CHECKING:
    from gateloop_transformer.generation import DraftReport


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="continue a text with a trained model", description="Continue a text, as it is drawn."
    )
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
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
        "--draft", type=folder, metavar="DIR", help="run of a smaller model that drafts bytes, for speed"
    )
    parser.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="bytes drafted at once (default: 4)")
    parser.add_argument(
        "--stats", action="store_true", help="say bytes per second, and how many drafted ones came, on standard error"
    )
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")
    add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
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


def _stats(count: int, seconds: float, report: DraftReport | None) -> str:
    """One line about a generation, the prompt's reading included."""
    speed = f"{count:,} bytes in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} bytes/s"
    if report is None:
        return speed
    return f"{speed}; {report.accepted:,} of {report.drafted:,} drafted bytes accepted ({report.rate:.0%})"
