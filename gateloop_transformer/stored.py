"""Reading and writing stored files, JSON and safetensors with a checksum, with one clear error for damaged ones.

A sealed safetensors file has the SHA-256 of all its bytes in its metadata, computed with zeros in that place. A tool
that rewrites its tensors drops the metadata, and the checksum with it: such files are read unchecked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gateloop_transformer.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "sha256"
# The placeholder for the checksum in the metadata of a file that is to be sealed.
UNSEALED = {CHECKSUM: "0" * 64}
# The most bytes of a header, which is safetensors' own limit.
_LONGEST_HEADER = 100_000_000


class DamageError(ValueError):
    """A file is missing or cannot be read."""


def parse_json(content: str | bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        content: a string, or the bytes of a file.
        where: where the content came from, for the error.

    Raises:
        DamageError: it is not JSON, or Python cannot hold it: it is nested too deeply, or a number has too many digits.
    """
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        reason = str(error)
    except UnicodeDecodeError as error:
        raise DamageError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:
        # Python's own message advises to raise its limit, which is there for good reason.
        reason = "it has a number of more than 4,300 digits"
    raise DamageError(f"{where} is not JSON: {reason}")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        DamageError: there is no such file, or it cannot be read.
    """
    where = repr(os.fspath(path))
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DamageError(f"{where} is missing") from error
    except OSError as error:
        raise DamageError(f"cannot read {where}: {error.strerror or error}") from error
    return parse_json(content, where)


def as_text(name: str) -> str:
    r"""A file's name as valid text: bytes in it that are not text are shown as "\ufffd".

    >>> as_text("a\udcffb")
    'a�b'
    """
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


# ---- tensors -----------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None, framework: str = "torch"
) -> None:
    """Replace a safetensors file, whole or not at all; it is sealed where it says something of itself.

    Args:
        path: of the file.
        tensors: by name; none of them shares memory with another.
        metadata: what the file says of itself.
        framework: whose tensors they are, "torch" or "flax".

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    from safetensors import SafetensorError

    save = importlib.import_module(f"safetensors.{framework}").save_file
    if framework == "torch":
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as other:
        other.touch()
        mode = other.stat().st_mode
        try:
            save(dict(tensors), other, None if metadata is None else {**metadata, **UNSEALED})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise OSError(f"cannot write {str(path)!r}: {error}") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        # safetensors makes files that only their owner may read; this one is to be as readable as the others.
        other.chmod(mode)
        if metadata is not None:
            with other.open("r+b") as file:
                seal(file)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, the checksum left out.

    Raises:
        DamageError: there is no such file, it cannot be read, or it is sealed and has changed since.
    """
    with opened_tensors(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    metadata.pop(CHECKSUM, None)
    with path.open("rb") as content:
        check_seal(content, repr(str(path)))
    return tensors, metadata


@contextlib.contextmanager
def opened_tensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file, of which nothing but the header is read yet, as `safe_open` gives it.

    Raises:
        DamageError: there is no such file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DamageError(f"{str(path)!r} is missing")
    name = str(path)
    try:
        with path.open("rb") as content:
            if as_text(name) != name:
                # safetensors takes no name that is not UTF-8.
                name = f"/dev/fd/{content.fileno()}"
            with safe_open(name, framework) as file:
                yield file
    except (SafetensorError, OSError) as error:
        raise DamageError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def seal(file: BinaryIO) -> None:
    """Write the checksum into a safetensors file with `UNSEALED` in its metadata, and sort the metadata.

    Sorting makes the same tensors and metadata the same bytes: safetensors writes metadata in another order each time.

    Args:
        file: the file, opened to read and write.
    """
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(text) == size
    file.seek(8)
    file.write(text)
    place = _place_of_checksum(file)
    digits = _digest(file, place)
    file.seek(place)
    file.write(digits)


def check_seal(file: BinaryIO, where: str) -> bool:
    """Check the checksum of a safetensors file; returns whether it has one.

    Args:
        file: the file, opened to read.
        where: its name, for the error.

    Raises:
        DamageError: the file has a checksum, but a byte of it has changed since.
    """
    place = _place_of_checksum(file)
    if place < 0:
        return False
    file.seek(place)
    if file.read(64) != _digest(file, place):
        raise DamageError(f"{where} is damaged: its content does not have the checksum it was written with")
    return True


def _place_of_checksum(file: BinaryIO) -> int:
    """The position of the checksum's digits in a file; -1 where there is none."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    key = f'"{CHECKSUM}":"'.encode()
    place = file.read(min(size, _LONGEST_HEADER)).find(key)
    return place if place < 0 else 8 + place + len(key)


def _digest(file: BinaryIO, place: int) -> bytes:
    """The SHA-256 of a file, in hexadecimal digits, computed with zeros in place of the checksum."""
    file.seek(0)
    found = hashlib.sha256(file.read(place))
    found.update(b"0" * len(file.read(64)))
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest().encode()
