"""Where in a model something stopped being finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """Name the first module, in order of computation, whose parameters or output are not finite.

    Args:
        model: with the gradients of the step at fault, if any.
        ids: (B, T) integers, the step's input.
    """
    found: list[str] = []
    names = {module: name or "model" for name, module in model.named_modules()}

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        own = any(not torch.isfinite(p).all() for p in module.parameters(recurse=False))
        bad = isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all()
        if not found and (own or bad):
            what = "parameters" if own else "output"
            found.append(f"{what} of {names[module]} ({type(module).__name__})")

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    gradients = [
        name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    return f"gradient of {gradients[0]}" if gradients else "the loss itself"
