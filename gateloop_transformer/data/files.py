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
# Packed bytes that are unpacked at a time; all that they unpack to is in memory at once.
_PACKED = 1 << 14
_ZST_LARGEST_WINDOW = 1 << 31
# How compressed files begin.
_MARKS = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


class PackedError(ValueError):
    """Compressed data is damaged or ends too early."""


def unpacked_suffix(path: PurePath) -> str:
    """The suffix that says what a file holds; for compressed files, the one before .gz, .xz or .zst.

    >>> unpacked_suffix(PurePath("a/b.jsonl.gz")), unpacked_suffix(PurePath("b.txt"))
    ('.jsonl', '.txt')
    """
    return PurePath(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


def is_packed(path: PurePath) -> bool:
    """Tell by a file's suffix whether it is compressed."""
    return path.suffix.lower() in _OPENERS


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read bytes; if it ends in .gz, .xz or .zst, they are decompressed as they are read.

    Raises:
        ValueError: it cannot be read or decompressed, now or in the block; or zstandard is not installed.
    """
    with _readable(str(path)), path.open("rb") as raw, _unpacked(raw, path.suffix.lower()) as file:
        yield file


@contextlib.contextmanager
def open_standard_input() -> Iterator[BinaryIO]:
    """Open standard input; it is decompressed if it begins as .gz, .xz and .zst files do.

    Raises:
        ValueError: it is closed, or cannot be read or decompressed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    raw = cast(io.BufferedReader, sys.stdin.buffer)
    with _readable("standard input"), _unpacked(raw, packed_suffix(raw.peek(8))) as file:
        yield file


def packed_suffix(start: bytes) -> str:
    """The suffix for a compressed file that begins with these bytes; "" if it is not compressed."""
    return next((suffix for mark, suffix in _MARKS.items() if start.startswith(mark)), "")


def blocks(opened: contextlib.AbstractContextManager[BinaryIO]) -> Iterator[bytes]:
    """Yield the bytes of what `open_file` opens, a block at a time; no block is empty.

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
    except (gzip.BadGzipFile, EOFError, zlib.error, PackedError) as error:
        raise ValueError(f"cannot decompress {name!r}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {name!r}: {error.strerror or error}") from error


def _unpacked(raw: BinaryIO, suffix: str) -> contextlib.AbstractContextManager[BinaryIO]:
    opener = _OPENERS.get(suffix)
    return contextlib.nullcontext(raw) if opener is None else cast(Any, opener(raw))


def _open_xz(raw: BinaryIO) -> io.BufferedReader:
    # Each stream may be followed by zeros, a multiple of four.
    return io.BufferedReader(_Blocks(_frames(raw, lzma.LZMADecompressor, lzma.LZMAError, padding=4)), BLOCK)


def _open_zst(raw: BinaryIO) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(".zst files need the package zstandard: `pip install gateloop-transformer[data]`") from error

    def start() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_ZST_LARGEST_WINDOW).decompressobj()

    return io.BufferedReader(_Blocks(_frames(raw, start, zstandard.ZstdError)), BLOCK)


def _frames(
    raw: BinaryIO, start: Callable[[], Any], failure: type[Exception], padding: int | None = None
) -> Iterator[bytes]:
    """Unpack consecutive frames.

    A last frame cut short, or anything else after a frame, is an error: Python's own reader of .xz ignores the latter,
    zstandard's ignores the former.

    Args:
        raw: the packed bytes.
        start: makes a decompressor for one frame.
        failure: the exception that it raises.
        padding: a frame may be followed by zeros whose number is a multiple of this; None: by none.

    Raises:
        PackedError: the data is damaged.
    """
    packed = raw.read(_PACKED)
    while packed:
        frame = start()
        while not frame.eof:
            if not packed:
                raise PackedError("it ends within a frame")
            try:
                content = frame.decompress(packed)
            except failure as error:
                raise PackedError(str(error)) from error
            packed = frame.unused_data if frame.eof else raw.read(_PACKED)
            yield content
        packed, zeros = packed or raw.read(_PACKED), 0
        while padding and packed.startswith(b"\0"):
            rest = packed.lstrip(b"\0")
            zeros += len(packed) - len(rest)
            packed = rest or raw.read(_PACKED)
        if padding and zeros % padding:
            raise PackedError(f"{zeros} zeros follow a stream, but padding must be a multiple of {padding}")


class _Blocks(io.RawIOBase):
    """A file made of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._ready = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._ready = memoryview(block)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": _open_xz, ".zst": _open_zst}


def walk(folder: Path, exclude: Collection[Path] = ()) -> list[Path]:
    """List all regular files below a folder in a fixed order, without hidden ones, runs and those below `exclude`."""
    left_out = {path.resolve() for path in exclude}
    found = []
    for base, folders, names in os.walk(folder):
        if Path(base) != folder and {".lock", "config.json"} <= set(names):
            # This is the folder of a run: files that training wrote are not data.
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
    """Find the files that a path or a glob names, and the path that their names are relative to.

    A single file is relative to itself, so that its name has no effect.

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
