"""Whole modules that the original pickled, read without running code: what is in them, and nothing that they can do.

Names of classes in a pickle are looked up here alone, where each is a `PickledModule` that keeps what the pickle says.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

# Modules within modules, and of all of these together, at most.
_DEEPEST, _MOST = 16, 100_000
# Attributes of a part that change no number.
_WITHOUT_EFFECT = {"training", "inplace"}


class PickledModule(Mapping[str, Tensor]):
    """A module as a mapping: its state dict.

    attributes: all that was pickled of it, modules, parameters and buffers in dictionaries of their own.
    """

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes.

        Raises:
            ValueError: these are no attributes of a module.
        """
        kinds = {"_modules": dict, "_parameters": dict, "_buffers": dict, "_non_persistent_buffers_set": set}
        if not isinstance(state, dict) or not all(
            isinstance(state.get(key, kind()), kind) for key, kind in kinds.items()
        ):
            raise ValueError(f"{type(self).__name__}: not the state of a module")
        self.attributes = state

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._state_dict[name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state_dict)

    def __len__(self) -> int:
        return len(self._state_dict)

    def modules(self) -> Iterator[tuple[str, PickledModule]]:
        """Itself and all modules in it, by the names that torch gives them.

        Raises:
            ValueError: there are too many, one within itself for example.
        """
        found: list[tuple[str, PickledModule]] = [("", self)]
        for path, module in found:
            if path.count(".") > _DEEPEST or len(found) > _MOST:
                raise ValueError(f"modules are nested more than {_DEEPEST} deep, or more than {_MOST:,}")
            yield path, module
            for name, child in module.attributes.get("_modules", {}).items():
                if isinstance(child, PickledModule):
                    found.append((f"{path}.{name}" if path else str(name), child))

    @functools.cached_property
    def _state_dict(self) -> dict[str, Any]:
        found = {}
        for path, module in self.modules():
            passing = module.attributes.get("_non_persistent_buffers_set", ())
            for kind in ("_parameters", "_buffers"):
                for name, value in module.attributes.get(kind, {}).items():
                    if value is not None and name not in passing:
                        found[f"{path}.{name}" if path else str(name)] = value
        return found


def _stand_ins() -> list[type[PickledModule]]:
    """Classes of the names that a pickle of the original's Transformer may hold, all of which do nothing."""
    layers = ("Transformer", "GateLoopedAttention", "CausalFullAttention", "RMSNorm", "PreNorm", "PostNorm")
    of_torch = (nn.Embedding, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Sequential, nn.SiLU)
    homes = [("gateloop_transformer.gateloop_transformer", layer) for layer in layers]
    homes += [(kind.__module__, kind.__name__) for kind in (*of_torch, nn.DataParallel)]
    homes += [
        ("einops.layers.torch", "Rearrange"),
        ("rotary_embedding_torch.rotary_embedding_torch", "RotaryEmbedding"),
    ]
    return [type(name, (PickledModule,), {"__module__": module}) for module, name in homes]


# For torch to take as safe; it finds them by their modules and names.
STAND_INS = _stand_ins()


def arguments(model: PickledModule) -> dict[str, Any]:
    """Arguments of the original's Transformer that its attributes show and no state dict does.

    Raises:
        ValueError: an attribute is missing, or the layers differ in one.
    """
    found = {name: _attribute("", model, name) for name in ("ablate_complex", "ablate_state_transition")}
    for path, mixer in model.modules():
        kind = type(mixer).__name__
        if kind == "GateLoopedAttention":
            names = ("frac_gradient_state_transition", "checkpoint_gate_looped_attn")
            values = {name: _attribute(path, mixer, name) for name in names}
        elif kind == "CausalFullAttention":
            scale = _attribute(path, mixer, "scale")
            if not 1e-6 < scale <= 1:
                raise ValueError(f"{path}: scale must be 1 / √dim_head, not {scale}")
            values = {
                "dim_head": round(scale**-2),
                "attn_softmax_normalize": _attribute(path, mixer, "softmax_normalize"),
                "frac_gradient_state_transition": _attribute(path, mixer, "frac_gradient_data_dependent_rel_pos"),
            }
        else:
            continue
        for name, value in values.items():
            if found.setdefault(name, value) != value:
                raise ValueError(f"{path}: {name} is {value}, in a layer before it {found[name]}")
    return found


def _attribute(path: str, module: PickledModule, name: str) -> Any:
    value = module.attributes.get(name)
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{path or 'the model'} has no {name} as gateloop-transformer 0.2.5 keeps it, but {value!r}")
    return value


def check_parts(model: PickledModule, own: nn.Module) -> None:
    """Compare the parts that have no parts of their own with those of a model of this package: kinds and numbers.

    Raises:
        ValueError: one differs: what it computes would be lost.
    """
    expected = {path: part for path, part in own.named_modules() if not part._modules}
    found = {path: part for path, part in model.modules() if not part.attributes.get("_modules")}
    missing = sorted(expected.keys() - found)
    if missing:
        raise ValueError(f"{missing[0]} is missing, where gateloop-transformer 0.2.5 has {_a(expected[missing[0]])}")
    for path, part in found.items():
        if type(part).__name__ != "Rearrange":
            _check_part(path, part, expected.get(path))


def _check_part(path: str, part: PickledModule, expected: nn.Module | None) -> None:
    if expected is None or type(part).__name__ not in {kind.__name__ for kind in type(expected).__mro__}:
        raise ValueError(f"{path} is {_a(part)}, where gateloop-transformer 0.2.5 has {_a(expected)}")
    for name, value in vars(expected).items():
        if name in _WITHOUT_EFFECT or name.startswith("_"):
            continue
        own = part.attributes.get(name, value)
        if type(own) is not type(value) or own != value:
            raise ValueError(f"{path} has {name} {own!r}, in gateloop-transformer 0.2.5 {value!r}")


def _a(part: object | None) -> str:
    return "nothing" if part is None else f"a part of the kind {type(part).__name__}"
