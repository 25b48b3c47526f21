"""Streams of documents from files, folders, globs, records, Hugging Face datasets and standard input."""

from __future__ import annotations

import itertools
import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gateloop_transformer.data.documents import Document, Source, stamp
from gateloop_transformer.data.files import (
    blocks,
    find_files,
    is_packed,
    open_file,
    open_standard_input,
    unpacked_suffix,
    walk,
)
from gateloop_transformer.data.hugging_face import HuggingFace, parse_hugging_face
from gateloop_transformer.data.records import json_lines, parquet_rows

# Folders of the standard library whose files are not ordinary sources.
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_LOOK_FOR_ZEROS = 8192
# The field of records that holds the text, unless another is named.
TEXT = "text"


class FileSource(Source):
    """The texts and records in files.

    Args:
        label: name of the source in messages.
        files: paths of the files.
        root: the path that the documents' names are relative to.
        field: the field of records that holds the text.
        name: name of a single file in messages; None: its path.
    """

    def __init__(self, label: str, files: list[Path], root: Path, field: str, name: str | None = None) -> None:
        super().__init__(label)
        self.name = name
        self.paths, self.root, self.field = files, root, field
        packed = [path for path in files if is_packed(path) and unpacked_suffix(path) == ".parquet"]
        if packed:
            raise ValueError(f"cannot read {str(packed[0])!r}: Parquet compresses by itself; unpack the file first")

    def documents(self, binary: bool = False) -> Iterator[Document]:
        self._start()
        found = False
        for path in self.paths:
            text = False
            for document in self._of(path, binary):
                text = found = True
                yield document
            self.files += text
        self._check_some(found)

    def _of(self, path: Path, binary: bool) -> Iterator[Document]:
        where, name = self.name or repr(str(path)), path.relative_to(self.root).as_posix()
        suffix = unpacked_suffix(path)
        if suffix == ".parquet":
            yield from self._texts(parquet_rows(path, self.field), name)
            return
        if suffix == ".jsonl":
            with open_file(path) as file:
                yield from self._texts(json_lines(file, where, self.field), name)
            return
        yield from self._text(blocks(open_file(path)), name, binary)

    def _text(self, content: Iterator[bytes], name: str, binary: bool) -> Iterator[Document]:
        first = next(content, b"")
        if not first:
            self.empty += 1
        elif b"\0" in first[:_LOOK_FOR_ZEROS] and not binary:
            self.binary += 1
        else:
            yield Document(name, itertools.chain([first], content))

    def identity(self) -> list[Any]:
        return ["files", [[*stamp(path), path.relative_to(self.root).as_posix()] for path in self.paths]]

    def size(self) -> int | None:
        if any(is_packed(path) or path.suffix.lower() in (".jsonl", ".parquet") for path in self.paths):
            return None
        return sum(path.stat().st_size for path in self.paths)


class StandardInput(FileSource):
    """Standard input, which can be read once: JSON lines if a field is given, else one text."""

    def __init__(self, field: str | None) -> None:
        path = Path("-" if field is None else "-.jsonl")
        super().__init__("standard input", [path], path, field or TEXT)

    def _of(self, path: Path, binary: bool) -> Iterator[Document]:
        if path.suffix == ".jsonl":
            with open_standard_input() as file:
                yield from self._texts(json_lines(file, self.label, self.field), ".")
            return
        yield from self._text(blocks(open_standard_input()), ".", binary)

    def identity(self) -> list[Any]:
        raise AssertionError("standard input has no identity before it is read")

    def size(self) -> int | None:
        return None


def is_standard_input(source: str | None) -> bool:
    """Tell whether the source is standard input, "-"."""
    return source == "-"


def is_remote(source: str | None) -> bool:
    """Tell whether the source is a Hugging Face dataset that is not a local folder."""
    return source is not None and source.startswith("hf:") and not os.path.exists(parse_hugging_face(source)[0])


def absolute(source: str | None) -> str | None:
    """Make a path in the source absolute, so that it means the same in another folder."""
    if not source or is_standard_input(source):
        return source
    if source.startswith("hf:"):
        name = parse_hugging_face(source)[0]
        return source.replace(name, os.path.abspath(name), 1) if os.path.exists(name) else source
    return os.path.abspath(source)


def open_source(source: str | None, *, field: str | None = None, exclude: Collection[Path] = ()) -> Source:
    """Open what `source` names.

    Args:
        source: what to read, see `documents.SOURCES`; None: the Python standard library's own sources.
        field: the field of records (JSON lines, Parquet, Hugging Face) that holds the text; None: "text". Where it is
            given, standard input is JSON lines.
        exclude: folders below the source that are not part of it.

    Raises:
        ValueError: nothing is there.
    """
    if source is None:
        return standard_library()
    if not source:
        raise ValueError("DATA must not be empty: name a file, a folder or a glob")
    if is_standard_input(source):
        return StandardInput(field)
    if source.startswith("hf:"):
        return HuggingFace(source, field or TEXT)
    files, root = find_files(source, exclude)
    if field is not None and not any(unpacked_suffix(path) in (".jsonl", ".parquet") for path in files):
        raise ValueError(f"--field {field}: {source!r} holds no records (.jsonl or .parquet), only whole texts")
    return FileSource(repr(source), files, root, field or TEXT)


def standard_library() -> FileSource:
    """Open the Python standard library's own sources on this machine, without tests.

    Raises:
        ValueError: there are none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in walk(root)
        if path.suffix == ".py" and not _NOT_SOURCES.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(f"no Python sources below {str(root)!r}: name a text file or a folder as DATA")
    return FileSource("the Python standard library", files, root, TEXT)
