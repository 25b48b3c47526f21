"""The command `gateloop inspect`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli import models
from gateloop_transformer.cli.flags import add_checkpoint, add_device, folder, typed
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import bar, importing
from gateloop_transformer.stored import as_text
from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gateloop_transformer.data.tokenizer import Tokenizer


HELP = "draw a trained model's gates on a text"
DESCRIPTION = (
    "Read a text with a trained model and show its gates: how long each head remembers at each token, where memory is "
    "reset, the spectrum of the gates, and what is predicted right. Writes index.html, a self-contained page, and PNGs."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("dir", metavar="DIR", type=folder, help="folder of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="TEXT", help="the text to read")
    what.add_argument("--file", metavar="PATH", help="the file to read; .gz, .xz and .zst too; - for standard input")
    parser.add_argument("--out", type=folder, metavar="OUT", help="folder for the pictures (default: DIR/inspect)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens to read from the start of the text, 2 to 4000 (default: 512)",
    )
    add_device(parser)
    add_checkpoint(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help='print what was found as one JSON object; half-lives in tokens, "∞" where nothing is forgotten',
    )


def run(arguments: argparse.Namespace) -> None:
    """Inspect a model."""
    with importing("torch and matplotlib"):
        from gateloop_transformer.evaluation.reading import text_blocks
        from gateloop_transformer.files import make_folder, write_text
        from gateloop_transformer.inspection.draw import draw
        from gateloop_transformer.inspection.page import MOST_TOKENS, page
        from gateloop_transformer.inspection.report import report
        from gateloop_transformer.inspection.trace import trace
        from gateloop_transformer.runs.checkpoint import weights_file
        from gateloop_transformer.runs.folder import load_tokenizer

    if not 2 <= arguments.tokens <= MOST_TOKENS:
        raise ValueError(f"--tokens must be from 2 to {MOST_TOKENS}, not {arguments.tokens}")
    out = _check_out(arguments)
    tokenizer = load_tokenizer(arguments.dir)
    model = models.load(arguments.dir, weights_file(arguments.dir, arguments.checkpoint), arguments.device)
    text = text_blocks(arguments.file) if arguments.text is None else iter([typed(arguments.text)])
    ids, more = _first_tokens(tokenizer, text, arguments.tokens)
    notes = []
    if more:
        how = ", the most that a page holds" if len(ids) == MOST_TOKENS else ": --tokens N takes more"
        notes.append(f"only the first {len(ids):,} tokens of the text are shown{how}")
        print(f"gateloop inspect: {notes[0]}", file=sys.stderr)
    with waiting("reading the text"):
        found = report(trace(model, ids), tokenizer)
    make_folder(out)
    # The page is written first: it marks the pictures next to it as ours to replace.
    write_text(out / "index.html", page(found, _title(arguments), notes))
    with bar("drawing", len(found.figures["layers"]), "layer") as progress:
        images = draw(found, out, progress.update)
    for old in set(_pictures(out)) - set(images):
        old.unlink()
    result = {**found.figures, "cut": more, "page": str(out / "index.html"), "images": list(map(str, images))}
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
        return
    print(_described(result))


def _check_out(arguments: argparse.Namespace) -> Path:
    """The folder for the pictures.

    Raises:
        ValueError: it is a file, or holds other files under the names of the page or the pictures.
    """
    out: Path = arguments.dir / "inspect" if arguments.out is None else arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {str(out)!r} is a file, not a folder")
    # An earlier page and its pictures are replaced; somebody's own are not.
    page = out / "index.html"
    ours = page.is_file() and b'content="gateloop inspect"' in page.read_bytes()[:1000]
    if page.exists() and not ours:
        raise ValueError(f"--out: {str(page)!r} exists and is not a page of 'gateloop inspect': choose another folder")
    for picture in _pictures(out):
        if picture.is_dir() or not ours:
            raise ValueError(
                f"--out: {str(picture)!r} exists and is not from 'gateloop inspect': choose another folder"
            )
    return out


def _pictures(out: Path) -> list[Path]:
    """The files in a folder that have the name of a picture."""
    return [path for name in ("layer-*.png", "spectrum.png", "classes.png") for path in out.glob(name)]


def _title(arguments: argparse.Namespace) -> str:
    """The page's title: which model read which text."""
    names = {None: "a text", "-": "standard input"}
    text = names.get(arguments.file) or Path(arguments.file).name
    return as_text(f"{arguments.dir.resolve().name} on {text}")


def _first_tokens(tokenizer: Tokenizer, text: Iterable[bytes], count: int) -> tuple[npt.NDArray[np.int64], bool]:
    """The first `count` tokens of a text given in blocks, and whether it has more."""
    import numpy as np

    from gateloop_transformer.data.tokenizer import encode_blocks

    parts, size = [np.empty(0, dtype=np.int64)], 0
    for ids in encode_blocks(tokenizer, text):
        parts.append(ids.astype(np.int64))
        size += len(ids)
        if size > count:
            break
    return np.concatenate(parts)[:count], size > count


def _described(result: dict[str, Any]) -> str:
    """Describe each layer in a line, and say where the pictures are."""
    lines = [
        f"{result['tokens']:,} tokens: {result['bits_per_byte']:.4f} bits per byte, "
        f"{result['accuracy']:.1%} of the tokens predicted right"
    ]
    for layer in result["layers"]:
        if not layer["heads"]:
            lines.append(f"layer {layer['layer']}: {layer['mixer']}: {layer['note']}")
            continue
        low, middle, high = (_rounded(layer["half_life"][at]) for at in ("5%", "50%", "95%"))
        ratios = {name: found["ratio"] for name, found in layer["by_class"].items() if found["ratio"] is not None}
        most = max(ratios, key=lambda name: ratios[name], default=None)
        # Gates that are the same everywhere fade nowhere faster.
        fades = "" if most is None or ratios[most] < 1.005 else f"; fades fastest at: {most} (×{ratios[most]:.2f})"
        note = f" ({layer['note']})" if layer["note"] else ""
        lines.append(f"layer {layer['layer']}: half-lives of {low} to {high} tokens, median {middle}{fades}{note}")
    return "\n".join([*lines, f"page: {result['page']}", f"pictures: {len(result['images'])} PNGs beside it"])


def _rounded(life: float | str) -> str:
    return life if isinstance(life, str) else f"{life:.3g}"
