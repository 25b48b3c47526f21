"""What the commands' flags have in common, and a bar."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateloop_transformer.cli.errors import message


def add_fields(
    parser: argparse.ArgumentParser, kind: type, title: str, defaults: Mapping[str, Any] | None = None
) -> None:
    """One flag per field; a flag not given is absent from the namespace.

    `defaults`: what the help says where a field's own default does not hold; None: those of the presets.
    """
    from gateloop_transformer.training.config import value_types
    from gateloop_transformer.training.presets import PRESETS

    preset = {name for values in PRESETS.values() for name in values} if defaults is None else set()
    defaults = PRESETS["tiny"] if defaults is None else defaults
    group = parser.add_argument_group(title)
    accepted = value_types(kind)
    for item in dataclasses.fields(kind):
        if not item.init:
            continue
        flag = "--" + item.name.replace("_", "-")
        default = defaults.get(item.name, item.default)
        whose = "the preset's; tiny: " if item.name in preset else ""
        text = f"{item.metadata['help']} (default: {whose}{'none' if default is None else default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        kinds = [each for each in accepted[item.name] if each is not type(None)]
        if kinds == [bool]:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = {int: "N", float: "X", str: "WORD", bool: "BOOL"}[kinds[0]]
            convert = boolean if kinds[0] is bool else kinds[0]
            choices = item.metadata["choices"]
            group.add_argument(flag, type=convert, choices=choices, metavar=None if choices else metavar, **options)


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, not an empty text")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(message(error)) from error
    return Path(text)


def typed(text: str) -> bytes:
    """The bytes of a text on the command line: UTF-8 in every locale; what is no text there stays as it was typed."""
    return text.encode("utf-8", "surrogateescape")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() == "true"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint: which weights of a run."""
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="WHICH",
        help="weights: last, best (on validation data) or a step",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    from gateloop_transformer.layers.quantized import KINDS

    text = "of the weights of Linear layers, gates excepted: smaller is faster (default: float32)"
    parser.add_argument("--dtype", choices=KINDS, default="float32", help=text)


def add_field(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    text = "of JSON lines, Parquet files and datasets: where the text is (default: text)"
    parser.add_argument("--field", metavar="NAME", default=default, help=text)


def bytes_bar(total: int | None, delay: float = 0, unit: str = "B") -> Any:
    """A progress bar in bytes, or of `unit`, where there is a terminal and tqdm is installed, shown after `delay`
    seconds.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return NoBar()
    return tqdm(total=total, unit=unit, unit_scale=True, disable=None, dynamic_ncols=True, delay=delay)


class NoBar(contextlib.nullcontext["NoBar"]):
    def __enter__(self) -> NoBar:
        return self

    def update(self, _count: int) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to end."""
