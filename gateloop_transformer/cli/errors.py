"""Errors of the command line, each in one line."""

from __future__ import annotations

import os
import time

from gateloop_transformer.pictures import load_matplotlib

# The most characters of a message.
_LONGEST = 2000


def message(error: Exception) -> str:
    """Say what went wrong in one line, without an error number; a long line is cut."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        what = error.object[error.start : error.end]
        return f"{what!r} cannot be written in the encoding {error.encoding}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]} ..."


def let_main_speak() -> None:
    """Let the main process report an error first.

    Under a launcher, an error that ends one process mostly ends all: the main one reports it, and the launcher ends
    the others. Where that does not happen, this process reports it itself, later.
    """
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":
        time.sleep(5)


def check_installed() -> None:
    """Check that what training needs besides torch is installed.

    Raises:
        ValueError: it is not.
    """
    load_matplotlib()
    try:
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; `pip install gateloop-transformer[train]`") from error
