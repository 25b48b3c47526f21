"""What a state dict of the original's Transformer (gateloop-transformer 0.2.5) says about its arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gateloop_transformer.configuration import TransformerConfig

Shapes = Mapping[str, tuple[int, ...]]

# The original's arguments: the default, and the types of values. Those without a default are in every state dict.
_ARGUMENTS: dict[str, tuple[Any, tuple[type, ...]]] = {
    "dim": (None, (int,)),
    "num_tokens": (None, (int,)),
    "depth": (None, (int,)),
    "dim_head": (64, (int,)),
    "heads": (8, (int,)),
    "ff_mult": (4, (int,)),
    "checkpoint_gate_looped_attn": (True, (bool,)),
    "use_gate_looped_attn": (True, (bool,)),
    "gate_loop_heads": (None, (int, type(None))),
    "attn_add_swish_gating": (True, (bool,)),
    "dim_gate_looped_attn": (None, (int, type(None))),
    "attn_softmax_normalize": (None, (bool, type(None))),
    "data_dependent_rel_pos": (False, (bool,)),
    "frac_gradient_state_transition": (0.9, (float, int)),
    "ablate_complex": (False, (bool,)),
    "ablate_state_transition": (False, (bool,)),
    "rotary_emb": (False, (bool,)),
    "post_ln_norm": (False, (bool,)),
    "sub_ln": (False, (bool,)),
}
_MIXER = "layers.0.0.fn"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


class Arguments(NamedTuple):
    """The original's arguments, by where each value is from; every argument is in one of them.

    inferred: from names and shapes. given: by the user. assumed: defaults of what no state dict shows. unused: defaults
    of what changes nothing in such a model.
    """

    inferred: dict[str, Any]
    given: dict[str, Any]
    assumed: dict[str, Any]
    unused: dict[str, Any]

    def values(self) -> dict[str, Any]:
        """All of them, for `Transformer`."""
        found = {name: value for part in self for name, value in part.items()}
        return {name: found[name] for name in _ARGUMENTS}

    def config(self) -> TransformerConfig:
        """The same model's, in this package's words."""
        values = self.values()
        del values["num_tokens"], values["checkpoint_gate_looped_attn"]
        position = "released" if values.pop("data_dependent_rel_pos") else "none"
        return TransformerConfig(**values, data_dependent_rel_pos=position)


def infer(shapes: Shapes, given: Mapping[str, Any], seen: Mapping[str, Any]) -> Arguments:
    """The arguments of the original's Transformer.

    Args:
        shapes: of the state dict, by name.
        given: arguments that are known.
        seen: those that the model itself shows, where there is more of it than its state dict.

    Raises:
        ValueError: it is no state dict of the original's; a given value is none, or contradicts the shapes; or an
            argument that changes the numbers is open: the message says which values there are and how to give one.
    """
    _check_given(given)
    found = _model(shapes)
    if found["use_gate_looped_attn"]:
        found |= _gate(shapes)
        unseen = ["frac_gradient_state_transition", "ablate_complex", "ablate_state_transition"]
    else:
        found |= _attention(shapes)
        unseen = ["attn_softmax_normalize"]
        if found["data_dependent_rel_pos"]:
            unseen += ["frac_gradient_state_transition", "ablate_complex", "ablate_state_transition"]
    found |= seen
    _check_agreement(found, given)
    if not found["use_gate_looped_attn"]:
        found |= _heads(_inner(shapes), found, shapes, {**given, **seen})
    defaults = {name: default for name, (default, _) in _ARGUMENTS.items() if name not in found and name not in given}
    if "attn_softmax_normalize" in unseen and defaults.get("attn_softmax_normalize", 0) is None:
        defaults["attn_softmax_normalize"] = not found["data_dependent_rel_pos"]
    return Arguments(
        {name: value for name, value in found.items() if name not in given},
        {name: found.get(name, value) for name, value in given.items()},
        {name: value for name, value in defaults.items() if name in unseen},
        {name: value for name, value in defaults.items() if name not in unseen},
    )


def _check_given(given: Mapping[str, Any]) -> None:
    unknown = sorted(given.keys() - _ARGUMENTS)
    if unknown:
        raise ValueError(f"the original has no argument {unknown[0]!r}; there are {', '.join(_ARGUMENTS)}")
    for name, value in given.items():
        types = _ARGUMENTS[name][1]
        if type(value) not in types:
            raise ValueError(f"{name} must be {' or '.join(_WORDS[each] for each in types)}, not {value!r}")
        if int in types and float not in types and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
        if float in types and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    """The shape of a matrix that every such state dict has."""
    if name not in shapes:
        raise ValueError(f"{name} is missing")
    if len(shapes[name]) != 2 or min(shapes[name]) < 1:
        raise ValueError(f"{name} must be a matrix, and is {shapes[name]}")
    rows, columns = shapes[name]
    return rows, columns


def _model(shapes: Shapes) -> dict[str, Any]:
    num_tokens, dim = _matrix(shapes, "token_emb.weight")
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d{1,9})\.", name))}
    if numbers != set(range(len(numbers))) or not numbers:
        there = "none" if not numbers else ", ".join(map(str, sorted(numbers)[:9]))
        raise ValueError(f"layers must be numbered from 0 on without a gap; there are: {there}")
    inner = _matrix(shapes, "layers.0.1.fn.0.weight")[0]
    if inner % dim:
        raise ValueError(f"layers.0.1.fn.0.weight has {inner} rows, which is no multiple of the width {dim}")
    gate, attention = f"{_MIXER}.to_qkv.weight" in shapes, f"{_MIXER}.to_qkv.0.weight" in shapes
    if gate == attention:
        raise ValueError(f"{_MIXER} must have either to_qkv.weight (gate loop) or to_qkv.0.weight (attention)")
    return {
        "dim": dim,
        "num_tokens": num_tokens,
        "depth": len(numbers),
        "ff_mult": inner // dim,
        "use_gate_looped_attn": gate,
        "attn_add_swish_gating": f"{_MIXER}.to_gates.0.weight" in shapes,
        "post_ln_norm": "layers.0.0.norm.weight" in shapes,
    }


def _gate(shapes: Shapes) -> dict[str, Any]:
    return {
        "gate_loop_heads": _matrix(shapes, f"{_MIXER}.to_a.0.weight")[0] // 2,
        "dim_gate_looped_attn": _inner(shapes),
        "sub_ln": f"{_MIXER}.maybe_sub_ln.weight" in shapes,
    }


def _attention(shapes: Shapes) -> dict[str, Any]:
    return {
        "data_dependent_rel_pos": f"{_MIXER}.to_a.0.weight" in shapes,
        "rotary_emb": f"{_MIXER}.rotary_emb.freqs" in shapes,
    }


def _inner(shapes: Shapes) -> int:
    """The width of all heads together."""
    name = next(name for name in (f"{_MIXER}.to_qkv.weight", f"{_MIXER}.to_qkv.0.weight") if name in shapes)
    return _matrix(shapes, name)[0] // 3


def _check_agreement(found: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Given values are those found; None stands for what the original puts in its place."""
    stands_for = {
        "gate_loop_heads": found.get("dim_gate_looped_attn"),
        "dim_gate_looped_attn": found["dim"],
        "attn_softmax_normalize": not found.get("data_dependent_rel_pos"),
    }
    wrong = [
        f"{name} {value} was given, the checkpoint has {found[name]}"
        for name, value in given.items()
        if name in found and (stands_for[name] if value is None else value) != found[name]
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _heads(inner: int, found: dict[str, Any], shapes: Shapes, given: Mapping[str, Any]) -> dict[str, int]:
    """Heads and their size in attention layers, of which the shapes show the product alone, save with rotary_emb."""
    pairs = found["data_dependent_rel_pos"]
    sizes = [size for size in range(1, inner + 1) if inner % size == 0 and not (pairs and size % 2)]
    if found["rotary_emb"]:
        sizes = [size for size in sizes if size == 2 * sum(shapes[f"{_MIXER}.rotary_emb.freqs"])]
    if not sizes:
        raise ValueError(f"no head size goes with to_qkv of {inner} channels and the other parameters of {_MIXER}")
    fit = [
        size for size in sizes if given.get("dim_head", size) == size and given.get("heads") in (None, inner // size)
    ]
    if len(fit) == 1:
        return {"heads": inner // fit[0], "dim_head": fit[0]}
    values = f"heads × dim_head is {inner}, heads one of {', '.join(str(inner // size) for size in reversed(sizes))}"
    if not fit:
        said = ", ".join(f"{name} {given[name]}" for name in ("heads", "dim_head") if name in given)
        raise ValueError(f"{said} contradicts the checkpoint, in which {values}")
    usual = {name: _ARGUMENTS[name][0] for name in ("heads", "dim_head")}
    fits = usual["dim_head"] in fit and usual["heads"] * usual["dim_head"] == inner
    raise ValueError(
        f"heads and dim_head change the numbers and cannot be seen in the checkpoint: {values}; give one of the two, "
        f"such as --config '{{\"heads\": {usual['heads'] if fits else inner // fit[0]}}}' (the original's default, "
        f"heads {usual['heads']} of dim_head {usual['dim_head']}, {'fits' if fits else 'does not fit'})"
    )
