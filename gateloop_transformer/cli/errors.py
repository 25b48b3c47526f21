"""Errors in one line."""

from __future__ import annotations

import os
import time

from gateloop_transformer.pictures import load_matplotlib


def message(error: Exception) -> str:
    """What went wrong, in one line and without an error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        what = error.object[error.start : error.end]
        return f"{what!r} has no place in the encoding {error.encoding}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


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
        import accelerate  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; `pip install gateloop-transformer[train]`") from error
