"""Files and folders that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# What is not finished yet has a name that ends so.
PARTIAL = ".partial"


def cache_folder() -> Path:
    """The folder for what can be made again: $GATELOOP_CACHE, else $XDG_CACHE_HOME/gateloop, else ~/.cache/gateloop.

    Raises:
        ValueError: none of these is known.
    """
    own, general = os.environ.get("GATELOOP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    if general:
        return Path(general) / "gateloop"
    try:
        return Path.home() / ".cache" / "gateloop"
    except RuntimeError as error:
        raise ValueError("there is no home folder to keep a cache in: set GATELOOP_CACHE to a folder") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, where they are not there yet.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # The system says of any of the folders around it that it is missing, a file, or closed.
        raise ValueError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; it need not be there. Of a link, what it leads to is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_removable(path: Path) -> None:
    """Check that `remove` will not end half way for want of a permission.

    Raises:
        ValueError: it would.
    """
    inner = [] if path.is_symlink() or not path.is_dir() else [path]
    for base, folders, _ in os.walk(path) if inner else ():
        inner += [Path(base, name) for name in folders if not Path(base, name).is_symlink()]
    closed = [each for each in inner if not os.access(each, os.R_OK | os.W_OK | os.X_OK)]
    if not os.access(path.parent, os.W_OK | os.X_OK):
        closed.insert(0, path.parent)
    if closed:
        raise ValueError(f"{str(path)!r} cannot be deleted, and nothing was: {str(closed[0])!r} may not be changed")


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# ---- whole or not at all -----------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk and not only in the system's memory."""
    # Windows keeps folders itself, and wants files opened for writing.
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_whole(path: Path) -> None:
    """Call `sync` for a file, or for a folder and the files in it."""
    for each in path.iterdir() if path.is_dir() else ():
        sync(each)
    sync(path)


@contextlib.contextmanager
def aside(path: Path, contended: bool = False) -> Iterator[Path]:
    """Give a name beside `path`, on the same disk, at which there is nothing; what is there at the end is deleted.

    Args:
        path: of a file or a folder.
        contended: others may be writing the same without a lock, so the name is one that nobody else has. Else it is
            always the same one, and what a killed process has left there is deleted.
    """
    mark = f".{os.getpid()}-{secrets.token_hex(4)}" if contended else ""
    other = path.with_name(f"{path.name}{mark}{PARTIAL}")
    remove(other)
    try:
        yield other
    finally:
        with contextlib.suppress(OSError):
            remove(other)


@contextlib.contextmanager
def replacing(path: Path, contended: bool = False) -> Iterator[Path]:
    """Give a name for a new file or folder, which at the end takes the place of `path`, whole or not at all.

    Args:
        path: what is there stays as it is until then, and also where anything raises; a folder is deleted just
            before the new one takes its place.
        contended: as for `aside`.

    Raises:
        OSError: it cannot be written.
    """
    with aside(path, contended) as other:
        yield other
        sync_whole(other)
        if other.is_dir():
            remove(path)
        os.replace(other, path)


def write_bytes(path: Path, content: bytes, contended: bool = False) -> None:
    """Replace a file by `content`, whole or not at all; arguments and errors are those of `replacing`."""
    with replacing(path, contended) as other:
        other.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, whole or not at all; errors are those of `replacing`."""
    write_bytes(path, text.encode())


# ---- locks -------------------------------------------------------------------------------------------------

# The locks of this process. A child of a fork closes its copies: it must not keep a lock that its parent gave back.
_held: set[io.FileIO] = set()


def _let_go() -> None:
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def lock(path: Path, patience: float = 0.0, mode: int = 0o666) -> Iterator[OSError | None]:
    """Hold a lock that no other process has meanwhile; the system lets go when this one ends, however it does.

    Args:
        path: of the lock's file, which is made if it is not there and stays: once it were deleted, two processes could
            each lock a file of that name. A link there is not followed.
        patience: seconds to wait for another process that holds it.
        mode: who may open a new file, and by that wait for the lock.

    Yields:
        None where the lock is held; else what the system said, because it cannot lock files there.

    Raises:
        BlockingIOError: another process held it all the time.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), mode)
    file = io.FileIO(descriptor, "r+")
    _held.add(file)
    try:
        yield _wait(file, patience)
    finally:
        file.close()
        _held.discard(file)


def _wait(file: io.FileIO, patience: float) -> OSError | None:
    # Not filelock's classes, which look after paths, threads and forks in ways of their own: see docs/decisions/0012.
    from filelock import lock_descriptor

    deadline = time.monotonic() + patience
    try:
        while not lock_descriptor(file.fileno(), blocking=False):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        else:
            return None
    except OSError as error:
        return error
    raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock")
