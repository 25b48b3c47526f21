"""Errors in one line."""

from __future__ import annotations

import os
import time

from gateloop_transformer.pictures import load_matplotlib

# Characters of a message.
_LONGEST = 2000


def message(error: Exception) -> str:
    """What went wrong, in one line and without an error number; what was found may be long, and is cut."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        what = error.object[error.start : error.end]
        return f"{what!r} has no place in the encoding {error.encoding}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]} ..."


def let_main_speak() -> None:
    """Under a launcher, what ends one process mostly ends all: the main one says it, and the launcher ends the others.

    Where it does not come to that, this process says it itself, later.
    """
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":
        time.sleep(5)


def check_installed() -> None:
    """What training needs beside torch is there.

    Raises:
        ValueError: it is not.
    """
    load_matplotlib()
    try:
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; `pip install gateloop-transformer[train]`") from error
