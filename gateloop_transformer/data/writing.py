"""Writing files whole or not at all, and making and deleting folders."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, where they do not exist yet.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # The system's reason may be about any parent: missing, a file, or not writable.
        raise ValueError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    # Windows flushes folders itself, and needs files opened for writing.
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with its content, if it exists; the target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_removable(path: Path) -> None:
    """Check that `remove` will not stop half way for lack of a permission.

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


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content`, whole or not at all.

    Raises:
        OSError: it cannot be written; the earlier file stays as it was.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(content)
        sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
