"""A cache of folders: each entry exists whole or not at all, however many processes build it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gateloop_transformer.data.writing import make_folder, remove, sync

_PARTIAL = ".partial"
_DAY = 24 * 3600


def cache_folder() -> Path:
    """The cache's folder: $GATELOOP_CACHE, else $XDG_CACHE_HOME/gateloop, else ~/.cache/gateloop.

    Raises:
        ValueError: neither variable is set, and there is no home folder.
    """
    own, general = os.environ.get("GATELOOP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    if general:
        return Path(general) / "gateloop"
    try:
        return Path.home() / ".cache" / "gateloop"
    except RuntimeError as error:
        raise ValueError(
            "there is no home folder to keep the data's cache in: set GATELOOP_CACHE to a folder"
        ) from error


def make_cache_folder(folder: Path) -> None:
    """Make a folder of the cache, where it does not exist yet.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        make_folder(folder)
    except ValueError as error:
        raise ValueError(f"the data's cache: {error}; set GATELOOP_CACHE to another") from error


def build_once(target: Path, build: Callable[[Path], None], whole: Callable[[Path], bool]) -> None:
    """Make sure that the folder `target` is whole: keep it, or build it aside and rename it, so that a kill is safe.

    Processes that want the same folder wait for the first one; where files cannot be locked each builds its own, and
    one is kept. What killed builds have left is deleted.

    Args:
        target: the entry's folder, within the folder of all entries.
        build: fills an empty folder.
        whole: tells whether a folder exists and is whole.

    Raises:
        ValueError: the folder around it cannot be made.
        OSError: the entry cannot be written.
    """
    if whole(target):
        return
    make_cache_folder(target.parent)
    with _alone(target, wait=True) as locked:
        if whole(target):
            return
        _clean(target, locked)
        with aside(target) as folder:
            build(folder)
            _sync(folder)
            _publish(folder, target, whole)


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Make a new folder next to `target`; it is deleted at the end unless it was renamed."""
    folder = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def spool(folder: Path) -> Iterator[Path]:
    """Make a new folder in `folder`, deleted at the end; if this process is killed, the next build there deletes it."""
    make_cache_folder(folder)
    target = folder / f"spool-{secrets.token_hex(8)}"
    try:
        with _alone(target, wait=True), aside(target) as inner:
            yield inner
    finally:
        target.with_name(f"{target.name}.lock").unlink(missing_ok=True)


def _publish(folder: Path, target: Path, whole: Callable[[Path], bool]) -> None:
    if os.path.lexists(target) and not whole(target):
        damaged = target.with_name(f"{folder.name.removesuffix(_PARTIAL)}-damaged{_PARTIAL}")
        os.rename(target, damaged)
        remove(damaged)
    try:
        os.rename(folder, target)
    except OSError:
        # Where files cannot be locked, another process may have been faster.
        if not whole(target):
            raise


def _sync(folder: Path) -> None:
    """Flush all files of a folder, and the folder itself, to disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _clean(target: Path, locked: bool) -> None:
    """Delete what killed builds have left: those of `target`, if this process has locked it, and those not locked.

    Where files cannot be locked, a build that is a day old is taken for a killed one.
    """
    for partial in target.parent.glob(f"*{_PARTIAL}"):
        name = partial.name.split(".")[0]
        other = contextlib.nullcontext(locked) if name == target.name else _alone(target.with_name(name), wait=False)
        with contextlib.suppress(OSError), other as alone:
            if alone or time.time() - partial.stat().st_mtime > _DAY:
                remove(partial)


@contextlib.contextmanager
def _alone(target: Path, wait: bool) -> Iterator[bool]:
    """Lock `target` and yield whether that worked; the system releases the lock when the process ends, even killed."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
