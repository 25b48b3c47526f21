"""The command `gateloop eval`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli import figures, models
from gateloop_transformer.cli.flags import add_checkpoint, add_device, add_dtype, add_field, folder
from gateloop_transformer.cli.parser import Parser, Rare
from gateloop_transformer.cli.progress import bar, importing
from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    from gateloop_transformer.data.documents import Source
    from gateloop_transformer.data.tokenizer import Tokenizer
    from gateloop_transformer.model import Transformer


HELP = "measure the bits per byte of a trained model on any text"
DESCRIPTION = "Measure bits per byte: each document is read once from start to end, with the state carried along."


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    from gateloop_transformer.data.documents import SOURCES

    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    parser.add_argument("data", metavar="DATA", help=SOURCES)
    add_field(parser)
    add_device(parser)
    add_dtype(parser)
    add_checkpoint(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        action="store_true",
        help="report all figures at once: perplexity per token and per byte, bits per byte, tokens, bytes, and the "
        "loss by position up to 16 times the training context",
    )
    what.add_argument(
        "--by-position",
        action="store_true",
        help="report instead the losses in windows read from an empty state, by position and by how long ago the same "
        "tokens came before; this shows whether the model uses a longer context than that of training",
    )
    parser.add_argument(
        "--up-to",
        type=int,
        metavar="N",
        help=Rare("with --by-position: windows of N times the training context (default: 64, or less for short DATA)"),
    )
    both = "with --by-position or --suite"
    parser.add_argument(
        "--windows", type=int, metavar="N", help=Rare(f"{both}: N windows, evenly spread over DATA (default: all)")
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"{both}: draw the loss against the position")
    parser.add_argument(
        "--context",
        type=int,
        metavar="T",
        help=Rare(f"{both}: tokens in a training window (default: the run's; required for a converted model)"),
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"bits_per_byte": ..., "bytes": ...}; with --by-position {"by_position": [{"from": ..., "to": '
        '..., "tokens": ..., "loss": (nats per token), "bits_per_byte": ...}], "by_distance": [...], "context": ...}; '
        'with --suite {"perplexity_per_token": ..., "perplexity_per_byte": ..., "bits_per_byte": ..., "tokens": ..., '
        '"bytes": ..., "length_generalisation": {"context": ..., "reached": (times it), "by_position": [...]}, ...}',
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate a model."""
    _check_flags(arguments)
    with importing("torch"):
        from gateloop_transformer.data.sources import open_source
        from gateloop_transformer.runs.checkpoint import weights_file
        from gateloop_transformer.runs.folder import load_tokenizer

    counts = _Counts()
    with waiting("opening the data"):
        source = open_source(arguments.data, field=arguments.field)
        texts = counts.texts(source)
        # Data that cannot be read is refused before the model is loaded.
        documents = itertools.chain([next(texts)], texts)
    tokenizer = load_tokenizer(arguments.dir)
    if arguments.by_position or arguments.suite:
        arguments.context = _context(arguments)
    weights = weights_file(arguments.dir, arguments.checkpoint)
    model = models.load(arguments.dir, weights, arguments.device, arguments.dtype)
    if arguments.by_position:
        _by_position(arguments, model, documents, tokenizer)
        _say_left_out(source, counts)
    elif arguments.suite:
        _suite(arguments, model, documents, tokenizer, counts)
        _say_left_out(source, counts)
    else:
        _bits_per_byte(arguments, model, source, documents, tokenizer, counts)


def _bits_per_byte(
    arguments: argparse.Namespace,
    model: Transformer,
    source: Source,
    documents: Iterator[Iterator[bytes]],
    tokenizer: Tokenizer,
    counts: _Counts,
) -> None:
    """Print bits per byte."""
    from gateloop_transformer.data.documents import count
    from gateloop_transformer.data.tokenizer import encode_document
    from gateloop_transformer.evaluation.bits import Score, score

    total = Score(0.0, 0)
    with bar("evaluating", source.size()) as progress:
        for document in documents:
            ids = encode_document(tokenizer, document)
            new = score(model, ids, tokenizer, report=progress.update)
            total = Score(total.nats + new.nats, total.size + new.size)
    result: dict[str, Any] = {
        "bits_per_byte": total.bits_per_byte,
        "bytes": counts.size,
        "files": source.files,
        "documents": counts.documents,
    }
    of_files = _say_left_out(source, counts)
    if arguments.json:
        print(json.dumps(result))
        return
    where = count(counts.documents, "file" if of_files else "document")
    print(f"{result['bits_per_byte']:.4f} bits per byte over {counts.size:,} bytes in {where}")


def _say_left_out(source: Source, counts: _Counts) -> bool:
    """Print on standard error what was left out; returns whether documents are whole files."""
    from gateloop_transformer.data.documents import count

    of_files = counts.documents + counts.short == source.files
    for number, what in ((source.left_out, "empty"), (counts.short, "single-byte")):
        if number:
            left_out = count(number, f"{what} file" if of_files else f"{what} document")
            print(f"gateloop eval: {left_out} left out", file=sys.stderr)
    return of_files


def _check_flags(arguments: argparse.Namespace) -> None:
    from gateloop_transformer.runs.plot import check_png

    for flag, value in (
        ("--up-to", arguments.up_to),
        ("--windows", arguments.windows),
        ("--plot", arguments.plot),
        ("--context", arguments.context),
    ):
        fits = arguments.by_position or (arguments.suite and flag != "--up-to")
        if value is not None and not fits:
            raise ValueError(f"{flag} goes with --by-position{'' if flag == '--up-to' else ' or --suite'}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}")
    if arguments.plot is not None:
        check_png(arguments.plot)


def _context(arguments: argparse.Namespace) -> int:
    """The number of tokens that a window of the model's training predicts."""
    from gateloop_transformer.runs.config import is_flat
    from gateloop_transformer.runs.folder import read_config
    from gateloop_transformer.runs.weights import CONFIG
    from gateloop_transformer.stored import read_json

    if arguments.context is not None:
        return int(arguments.context)
    if (arguments.dir / CONFIG).is_file() and is_flat(read_json(arguments.dir / CONFIG)):
        raise ValueError(
            f"{str(arguments.dir)!r} does not say what context it was trained with: pass it as --context T"
        )
    return read_config(arguments.dir).training.context


def _suite(
    arguments: argparse.Namespace,
    model: Transformer,
    documents: Iterator[Iterator[bytes]],
    tokenizer: Tokenizer,
    counts: _Counts,
) -> None:
    """Print all figures."""
    from gateloop_transformer.evaluation.positions import tokens_on_disk
    from gateloop_transformer.evaluation.suite import generalisation, perplexities, windows
    from gateloop_transformer.runs.plot import draw_positions

    with tokens_on_disk(documents, tokenizer) as tokens:
        chosen = windows(tokens, arguments.context, arguments.windows)
        with bar("reading whole documents", counts.size) as progress:
            result: dict[str, Any] = perplexities(model, tokens, tokenizer, progress.update)
        with bar("reading windows", chosen.length * len(chosen.starts), "token") as progress:
            found = generalisation(model, tokens, chosen, arguments.context, tokenizer, progress.update)
        size = len(tokens)
    result |= {"tokens": size, "bytes": counts.size, "documents": counts.documents, "length_generalisation": found}
    if arguments.plot is not None:
        draw_positions(found["by_position"], arguments.context, arguments.plot)
    print(json.dumps(result) if arguments.json else figures.suite(result))


def _by_position(
    arguments: argparse.Namespace, model: Transformer, documents: Iterator[Iterator[bytes]], tokenizer: Tokenizer
) -> None:
    """Print losses by position and by distance, and draw them on request."""
    from gateloop_transformer.evaluation.positions import evenly, spread, tokens_on_disk, windows_up_to
    from gateloop_transformer.evaluation.spans import doubling_spans
    from gateloop_transformer.runs.plot import draw_positions

    context = arguments.context
    with tokens_on_disk(documents, tokenizer) as tokens:
        starts, times = windows_up_to(tokens, context, arguments.up_to)
        starts = starts if arguments.windows is None else evenly(starts, arguments.windows)
        length = times * context
        with bar("reading windows", length * len(starts), "token") as progress:
            spans = doubling_spans(length, context)
            found = spread(model, tokens, starts, length, spans, tokenizer, progress.update)
    result: dict[str, Any] = {
        "by_position": found.by_position(),
        "by_distance": found.by_distance(),
        "same_tokens": found.same,
        "context": context,
        "up_to": times,
        "windows": len(starts),
    }
    if arguments.up_to is None and times != 64:
        print(f"gateloop eval: DATA is too short for 64 times the training context: up to {times}", file=sys.stderr)
    if arguments.plot is not None:
        draw_positions(result["by_position"], context, arguments.plot)
    print(json.dumps(result) if arguments.json else figures.positions(result))


class _Counts:
    """Counts of what was read: documents, bytes, and documents of one byte, in which nothing can be predicted."""

    def __init__(self) -> None:
        self.documents = self.size = self.short = 0

    def texts(self, source: Source) -> Iterator[Iterator[bytes]]:
        """Yield the blocks of each document of two bytes or more.

        Raises:
            ValueError: there is none.
        """
        for document in source.documents(binary=True):
            first = next(document.blocks)
            if len(first) < 2:
                self.short += 1
                continue
            self.documents += 1
            yield self._counted(itertools.chain([first], document.blocks))
        if not self.documents:
            raise ValueError(f"{source.label} is too short: evaluation needs at least 2 bytes of text")

    def _counted(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.size += len(block)
            yield block
