"""Loading a run's model with the device and dtype of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    from gateloop_transformer.model import Transformer


def load(run: Path, weights: Path | None, device: str = "cpu", dtype: str | None = None) -> Transformer:
    """Load the model in a run's folder.

    Args:
        run: the folder.
        weights: the file of weights; None: the run's own.
        device: the value of --device.
        dtype: the value of --dtype; None: that of training.

    Raises:
        ValueError: there is no such model or device.
    """
    from gateloop_transformer.layers.quantized import quantize
    from gateloop_transformer.runs.folder import load_model, pick_device

    where = pick_device(device)
    with waiting("loading the model"):
        model = load_model(run, weights)
        return (model if dtype is None else quantize(model, dtype)).to(where)
