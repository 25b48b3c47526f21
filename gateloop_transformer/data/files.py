"""Files: found below folders and by globs, decompressed as they are read."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

# Bytes that a reader takes at a time.
BLOCK = 1 << 20
# Packed bytes that a .zst is fed with at a time: what comes out of them is in memory at once.
_ZST_BLOCK = 1 << 14
_ZST_LARGEST_WINDOW = 1 << 31
# How compressed files begin.
_MARKS = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


class PackedError(ValueError):
    """Compressed data is damaged or ends too early."""


def unpacked_suffix(path: PurePath) -> str:
    """The suffix that says what a file holds, of compressed ones that before .gz, .xz or .zst.

    >>> unpacked_suffix(PurePath("a/b.jsonl.gz")), unpacked_suffix(PurePath("b.txt"))
    ('.jsonl', '.txt')
    """
    return PurePath(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


def is_packed(path: PurePath) -> bool:
    """Whether the file is compressed."""
    return path.suffix.lower() in _OPENERS


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from, decompressed as they are read if it ends in .gz, .xz or .zst.

    Raises:
        ValueError: it cannot be read or decompressed, now or in the block; or zstandard is not installed.
    """
    with _readable(str(path)), path.open("rb") as raw, _unpacked(raw, path.suffix.lower()) as file:
        yield file


@contextlib.contextmanager
def open_standard_input() -> Iterator[BinaryIO]:
    """Standard input, decompressed if it begins as .gz, .xz and .zst files do.

    Raises:
        ValueError: it is closed, or cannot be read or decompressed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    raw = cast(io.BufferedReader, sys.stdin.buffer)
    with _readable("standard input"), _unpacked(raw, packed_suffix(raw.peek(8))) as file:
        yield file


def packed_suffix(start: bytes) -> str:
    """The suffix of the kind of compressed file that begins so; none if it is not one."""
    return next((suffix for mark, suffix in _MARKS.items() if start.startswith(mark)), "")


def blocks(opened: contextlib.AbstractContextManager[BinaryIO]) -> Iterator[bytes]:
    """The bytes of what `open_file` opens, a block at a time; never an empty block.

    Raises:
        ValueError: it cannot be read or decompressed.
    """
    with opened as file:
        while block := file.read(BLOCK):
            yield block


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error, PackedError) as error:
        raise ValueError(f"cannot decompress {name!r}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {name!r}: {error.strerror or error}") from error


def _unpacked(raw: BinaryIO, suffix: str) -> contextlib.AbstractContextManager[BinaryIO]:
    opener = _OPENERS.get(suffix)
    return contextlib.nullcontext(raw) if opener is None else cast(Any, opener(raw))


def _open_zst(raw: BinaryIO) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(".zst files need the package zstandard: `pip install gateloop-transformer[data]`") from error
    return io.BufferedReader(_ZstReader(raw, zstandard), BLOCK)


class _ZstReader(io.RawIOBase):
    """Frames of zstandard one after the other; a last one cut short is an error, which zstandard's own reader hides."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(_ZST_BLOCK)
            if not self._packed:
                if self._frame is not None:
                    raise PackedError("it ends within a frame")
                return 0
            self._ready = memoryview(self._decompress())
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decompress(self) -> bytes:
        if self._frame is None:
            decompressor = self._zstandard.ZstdDecompressor(max_window_size=_ZST_LARGEST_WINDOW)
            self._frame = decompressor.decompressobj()
        try:
            content: bytes = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as error:
            raise PackedError(str(error)) from error
        self._packed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return content


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst}


def walk(folder: Path, exclude: Collection[Path] = ()) -> list[Path]:
    """All regular files below a folder in a fixed order; hidden ones, runs, and what is below `exclude` left out."""
    left_out = {path.resolve() for path in exclude}
    found = []
    for base, folders, names in os.walk(folder):
        if Path(base) != folder and {".lock", "config.json"} <= set(names):
            # The folder of a run: what training wrote is not to be trained on.
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (not left_out or (Path(base) / name).resolve() not in left_out)
        )
        found += [Path(base) / name for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def find_files(source: str, exclude: Collection[Path] = ()) -> tuple[list[Path], Path]:
    """The files that a path or a glob names, and the path that their names are relative to.

    A file alone is relative to itself: then what it is called means nothing.

    Raises:
        ValueError: there are none, or the path is neither a regular file nor a folder.
    """
    path = Path(source)
    if path.is_dir():
        files, root = walk(path, exclude), path
    elif path.exists() and not path.is_file():
        raise ValueError(f"{source!r} is neither a regular file nor a folder")
    elif path.exists():
        files, root = [path], path
    else:
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if os.path.isfile(name)]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    if not files and path.is_dir():
        raise ValueError(f"the folder {source!r} holds no files (hidden ones do not count)")
    if not files:
        raise ValueError(f"no file, folder or glob match at {source!r}")
    return files, root
