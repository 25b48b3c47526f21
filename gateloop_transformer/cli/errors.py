"""Errors in one line."""

from __future__ import annotations


def message(error: Exception) -> str:
    """What went wrong, in one line and without an error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
