"""Tokens on disk: written in order into files of bounded size, read through memory mappings."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

# The most bytes of a file of tokens.
SHARD = 1 << 28
# The system may map this many bytes around each place that is read.
_AROUND = 1 << 21
# Mapped pages count as memory of the process, so they are released after this many bytes.
_HELD = 1 << 26

Ids = npt.NDArray[Any]
Places = npt.NDArray[np.int64]


class Shard(NamedTuple):
    """A file of tokens, raw and little-endian, and how many there are."""

    name: str
    tokens: int


class Writer:
    """Appends tokens, and the positions where documents begin, to files of one name.

    Args:
        folder: where the files are made.
        name: the files' name, before "-00000.bin" and "-starts.bin".
        dtype: dtype of the tokens.
        limit: most bytes of a file of tokens.

    Attributes:
        tokens, documents: numbers written so far.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], limit: int = SHARD) -> None:
        self._folder, self.name = folder, name
        self._room = max(1, limit // dtype.itemsize)
        self._file: BinaryIO | None = None
        self._starts = (folder / f"{name}-starts.bin").open("wb")
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self.shards: list[Shard] = []
        self.tokens = self.documents = 0

    def write(self, ids: Ids, starts: Places) -> None:
        """Append tokens (N,); `starts` are the positions in them where documents begin."""
        places = (starts + self.tokens).astype("<i8", copy=False).tobytes()
        self._starts.write(places)
        self._hashes[1].update(places)
        self.documents += len(starts)
        self._hashes[0].update(np.ascontiguousarray(ids).view(np.uint8).data)
        self.tokens += len(ids)
        while len(ids):
            if self._file is None or self.shards[-1].tokens == self._room:
                self._next_file()
            assert self._file is not None
            last = self.shards[-1]
            part = ids[: self._room - last.tokens]
            self._file.write(part.data)
            self.shards[-1] = last._replace(tokens=last.tokens + len(part))
            ids = ids[len(part) :]

    def _next_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self.shards.append(Shard(f"{self.name}-{len(self.shards):05d}.bin", 0))
        self._file = (self._folder / self.shards[-1].name).open("wb")

    def close(self) -> None:
        """Close the files."""
        self._starts.close()
        if self._file is not None:
            self._file.close()

    @property
    def digest(self) -> str:
        """The hashes of all tokens and starts, whatever files they are in."""
        return " ".join(each.hexdigest() for each in self._hashes)


def join_starts(folder: Path, writers: Iterable[Writer], target: Path) -> None:
    """Join the starts of several writers in one file, as positions in their concatenated tokens."""
    before = 0
    with target.open("wb") as file:
        for writer in writers:
            path = folder / f"{writer.name}-starts.bin"
            with path.open("rb") as own:
                while block := own.read(1 << 20):
                    file.write((np.frombuffer(block, "<i8") + before).astype("<i8").tobytes())
            path.unlink()
            before += writer.tokens


class _Store:
    """Concatenated arrays of tokens, and where documents begin in them."""

    def __init__(self, arrays: list[Ids], starts: Places, maps: list[mmap.mmap]) -> None:
        self._arrays, self._starts, self._maps = arrays, starts, maps
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self._touched = 0

    def read(self, start: int, stop: int) -> Places:
        ids = np.empty(stop - start, dtype=np.int64)
        done, n = 0, int(np.searchsorted(self._ends, start, side="right"))
        while done < len(ids):
            array = self._arrays[n]
            begin = start + done - (int(self._ends[n]) - len(array))
            part = array[begin : begin + len(ids) - done]
            ids[done : done + len(part)] = part
            done, n = done + len(part), n + 1
            self._touch(part.nbytes)
        return ids

    def starts(self, start: int, stop: int) -> Places:
        low, high = np.searchsorted(self._starts, [start, stop])
        self._touch(_AROUND)
        return np.array(self._starts[low:high], dtype=np.int64)

    def _touch(self, size: int) -> None:
        self._touched += size + _AROUND
        if self._touched > _HELD and hasattr(mmap, "MADV_DONTNEED"):
            self._touched = 0
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)


class Tokens:
    """A read-only sequence of tokens, in part of a store."""

    def __init__(self, store: _Store, start: int, stop: int) -> None:
        self._store, self._start, self._stop = store, start, stop

    @classmethod
    def of(cls, ids: npt.ArrayLike, starts: npt.ArrayLike = (0,)) -> Tokens:
        """Hold tokens in memory (N,), and the positions where documents begin, ascending."""
        array = np.asarray(ids)
        return cls(_Store([array], np.asarray(starts, dtype=np.int64), []), 0, len(array))

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, stop: int) -> Places:
        """Copy the tokens in [start, stop).

        Raises:
            IndexError: the range is not within the tokens.
        """
        self._check(start, stop)
        return self._store.read(self._start + start, self._start + stop)

    def starts(self, start: int, stop: int) -> Places:
        """The positions in [start, stop) where a document begins, ascending.

        Raises:
            IndexError: the range is not within the tokens.
        """
        self._check(start, stop)
        return self._store.starts(self._start + start, self._start + stop) - self._start

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} are not within the {len(self)} tokens")


def open_tokens(folder: Path, shards: Iterable[Shard], dtype: np.dtype[Any], starts: Path, cut: int) -> list[Tokens]:
    """Open the tokens of shards as two sequences: those up to `cut`, and those from there on."""
    maps, arrays = [], []
    for shard in shards:
        mapped = _map(folder / shard.name)
        maps.append(mapped)
        arrays.append(np.frombuffer(mapped, dtype=dtype))
    maps.append(_map(starts))
    store = _Store(arrays, np.frombuffer(maps[-1], dtype="<i8"), maps)
    total = sum(len(array) for array in arrays)
    return [Tokens(store, 0, cut), Tokens(store, cut, total)]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
