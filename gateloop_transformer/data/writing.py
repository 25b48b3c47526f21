"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


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


def sync(path: Path) -> None:
    """A file or a folder is on disk, not only in the system's memory."""
    # Windows keeps folders itself, and wants files opened for writing.
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; it need not be there. Of a link, what it leads to is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_removable(path: Path) -> None:
    """`remove` will not end half way for want of a permission.

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
        OSError: it cannot be written; what was there still is.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(content)
        sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
