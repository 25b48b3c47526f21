"""Flags that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gateloop_transformer.arguments import WEIGHT_KINDS
from gateloop_transformer.cli.errors import message
from gateloop_transformer.cli.parser import Parser, Rare


def add_fields(
    parser: Parser, kind: type, title: str, defaults: Mapping[str, Any] | None = None, common: bool = False
) -> None:
    """Add one flag per field; a flag that is not given is absent from the namespace.

    `defaults`: the defaults that the help names instead of a field's own; None: those of the presets. `common`: --help
    shows all fields, not only those marked common.
    """
    from gateloop_transformer.runs.config import value_types
    from gateloop_transformer.runs.presets import PRESETS

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
        shown = text if common or item.metadata["common"] else Rare(text)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown}
        kinds = [each for each in accepted[item.name] if each is not type(None)]
        if kinds == [bool]:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = {int: "N", float: "X", str: "WORD", bool: "BOOL"}[kinds[0]]
            convert = boolean if kinds[0] is bool else kinds[0]
            choices = item.metadata["choices"]
            group.add_argument(flag, type=convert, choices=choices, metavar=None if choices else metavar, **options)


@contextlib.contextmanager
def named_as_flags(given: Iterable[str]) -> Iterator[None]:
    """Make errors about settings name the flags that were given instead of the fields that they set.

    A field whose name is also an English word is renamed only where the error speaks of a setting: "steps must be",
    "dim=0".

    Args:
        given: names of the fields that were given.
    """
    as_setting = r"(?=\s+(?:must|needs?)\b|\s+\+|=)"
    names = "|".join(name if "_" in name else name + as_setting for name in given)
    field = re.compile(rf"(?<![\w'-])(?:{names})(?![\w'])") if names else None
    try:
        yield
    except ValueError as error:
        if field is None or type(error) is not ValueError:
            raise
        raise ValueError(field.sub(lambda found: "--" + found[0].replace("_", "-"), str(error))) from error


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, not an empty string")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(message(error)) from error
    return Path(text)


def typed(text: str) -> bytes:
    """The bytes of a text on the command line: UTF-8 in every locale; invalid bytes stay as they were typed."""
    return text.encode("utf-8", "surrogateescape")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() == "true"


def add_checkpoint(parser: Parser, where: str = "") -> None:
    """Add --checkpoint, which picks the weights of a run; `where` is put before its help."""
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="WHICH",
        help=f"{where}which weights to load: last, best (on validation data) or a step (default: last)",
    )


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda, ... (default: auto)")


def add_dtype(parser: Parser) -> None:
    """Add --dtype."""
    text = "dtype of the weights of Linear layers, except those of gates: smaller is faster (default: float32)"
    parser.add_argument("--dtype", choices=WEIGHT_KINDS, default="float32", help=text)


def add_field(parser: Parser, default: str | None = None) -> None:
    """Add --field."""
    text = "the field of JSON lines, Parquet files and datasets that holds the text (default: text)"
    parser.add_argument("--field", metavar="NAME", default=default, help=text)
