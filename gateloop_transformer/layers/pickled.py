"""Objects that the original (gateloop-transformer 0.2.5) pickled, as objects of this package.

A pickle names modules and classes, which exist here under the original's names, and gives each object the attributes
that it had there. `revive` gives it those that it has here, and takes out what rearranged tensors between the modules:
the layers here do that themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def revive(
    state: Mapping[str, Any],
    build: type[nn.Module],
    arguments: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The attributes of a layer that was built here, with the parts and the attributes of one that was built there.

    Args:
        state: the original's attributes.
        build: the class here.
        arguments: of the class, from those attributes and the parts by their names.

    Raises:
        ValueError: the original's layer lacks an attribute or a part, or a part has no weights where those have some.
    """
    parts: dict[str, nn.Module] = state.get("_modules", {})
    try:
        with torch.device("meta"):
            fresh = vars(build(**arguments({**state, **parts})))
        kept = {name: _without_rearranging(parts[name]) for name in fresh["_modules"]}
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{build.__name__}: not pickled by gateloop-transformer 0.2.5 ({error}): load it with the release that "
            "wrote it, and save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    # What is computed on request here was kept there.
    own = {name: value for name, value in state.items() if not isinstance(getattr(build, name, None), property)}
    return {**fresh, **own, "_modules": kept}


def _without_rearranging(module: nn.Module) -> nn.Module:
    """A container without what rearranges tensors at its end; at its beginning an Identity takes that place."""
    if isinstance(module, nn.Sequential):
        for n, child in reversed(list(enumerate(module))):
            if type(child).__module__.startswith("einops"):
                if n:
                    del module[n]
                else:
                    module[n] = nn.Identity()
    return module
