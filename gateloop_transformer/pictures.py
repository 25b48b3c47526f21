"""Pictures in files, drawn by matplotlib without a window and without the environment's backend."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gateloop_transformer.files import replacing
from gateloop_transformer.stored import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend


def load_matplotlib() -> None:
    """Import matplotlib, whatever backend MPLBACKEND names.

    A notebook passes its backend on to every process that it starts, and matplotlib refuses to be imported where that
    backend is not installed. Where it is installed, other pictures of this process still go to it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if sys.modules.get("matplotlib") is not None:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("matplotlib is not installed; `pip install gateloop-transformer[train]`") from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def empty_figure(width: float, height: float) -> Figure:
    """Make an empty figure; width and height are in inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, target: Path, dpi: int = 120) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(target) as other:
        figure.savefig(other, format="png", dpi=dpi)


def name_lines(legend: Legend, names: Iterable[str]) -> None:
    """Put a user's names into a legend, in its order, literally.

    By itself matplotlib takes text between two dollars for a formula, and leaves out names that begin with "_".
    """
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(as_text(name))
        text.set_parse_math(False)
