"""A cache of folders: each entry exists whole or not at all, however many processes build it."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gateloop_transformer.files import PARTIAL, aside, lock, make_folder, remove, sync_whole

_DAY = 24 * 3600


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
    with lock(_lock_of(target), math.inf) as trouble:
        if whole(target):
            return
        _clean(target, trouble)
        with aside(target, contended=True) as folder:
            folder.mkdir()
            build(folder)
            sync_whole(folder)
            _publish(folder, target, whole)


@contextlib.contextmanager
def spool(folder: Path) -> Iterator[Path]:
    """Make a new folder in `folder`, deleted at the end; if this process is killed, the next build there deletes it."""
    make_cache_folder(folder)
    target = folder / f"spool-{secrets.token_hex(8)}"
    try:
        with lock(_lock_of(target), math.inf), aside(target, contended=True) as inner:
            inner.mkdir()
            yield inner
    finally:
        _lock_of(target).unlink(missing_ok=True)


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _publish(folder: Path, target: Path, whole: Callable[[Path], bool]) -> None:
    if os.path.lexists(target) and not whole(target):
        with aside(target, contended=True) as damaged:
            os.rename(target, damaged)
    try:
        os.rename(folder, target)
    except OSError:
        # Where files cannot be locked, another process may have been faster.
        if not whole(target):
            raise


def _clean(target: Path, trouble: OSError | None) -> None:
    """Delete what killed builds have left: of `target`, which this process has locked, and of what nobody locks.

    Where files cannot be locked, a build that is a day old is taken for a killed one.
    """
    for partial in target.parent.glob(f"*{PARTIAL}"):
        name = partial.name.split(".")[0]
        own = name == target.name
        # What somebody else has locked raises an error, and stays.
        with (
            contextlib.suppress(OSError),
            contextlib.nullcontext(trouble) if own else lock(_lock_of(target.with_name(name))) as there,
        ):
            if there is None or time.time() - partial.stat().st_mtime > _DAY:
                remove(partial)
