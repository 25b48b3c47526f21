"""Record cases of the original package: its outputs and gradients for weights and inputs drawn here.

Writes OUT/own_*.npz; `tests/test_parity.py` compares this package with all files in `tests/recorded/parity`. A
file holds `meta` (JSON: kind, class, constructor and call arguments), `param:*` (weights), `in:*`, `out:*`,
`weight` (gradients are of the sum of y · weight) and `grad:*`; what has no gradient has no `grad:*`. Kinds:

- layer: in:x → out:y; grad:x, grad:param:*.
- model: in:ids → out:logits, and out:loss, whose gradients are grad:param:*.
- cached: in:x fed in `pieces` through the returned cache → out:y.
- cache: in:x, in:cache_a, in:cache_kv → out:y, out:cache_a, out:cache_kv; gradients are of the sum of
  y · weight and cache_kv · weight:cache_kv, and grad:cache_kv is one of them.

Run it in an environment of its own, since both packages share the import name:

    python -m venv original
    original/bin/pip install gateloop-transformer==0.2.5 numpy
    original/bin/python record_parity.py OUT

Weights and inputs follow from each case's seed; a second run writes the same numbers up to rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import gateloop_transformer

ORIGINAL = "0.2.5"


class Case(NamedTuple):
    """What to record.

    shape: (B, T).
    scale: of the input.
    gain: {a parameter's name: factor on that parameter}.
    lean: turn the gates of the data-dependent position towards phase 0. Keys are divided by the real part of
        a product of gates, clamped at 1e-10: gates of any phase give scores up to 1e10, beside which ordinary
        ones do not show in a relative error.
    pieces: lengths, of a cached case.
    """

    kind: str
    cls: str
    init: Mapping[str, Any]
    shape: tuple[int, int]
    seed: int
    call: Mapping[str, Any] = MappingProxyType({})
    scale: float = 1.0
    gain: Mapping[str, float] = MappingProxyType({})
    lean: bool = False
    pieces: tuple[int, ...] = ()


def gate(shape: tuple[int, int], seed: int, init: dict[str, Any], **options: Any) -> Case:
    """A case of GateLoopedAttention."""
    return Case("layer", "GateLoopedAttention", init, shape, seed, **options)


def attention(shape: tuple[int, int], seed: int, init: dict[str, Any], **options: Any) -> Case:
    """A case of CausalFullAttention."""
    return Case("layer", "CausalFullAttention", init, shape, seed, **options)


def simple(kind: str, shape: tuple[int, int], seed: int, init: dict[str, Any], **options: Any) -> Case:
    """A case of SimpleGateLoopLayer."""
    return Case(kind, "SimpleGateLoopLayer", init, shape, seed, **options)


def model(shape: tuple[int, int], seed: int, init: dict[str, Any], **options: Any) -> Case:
    """A case of Transformer."""
    return Case("model", "Transformer", {"num_tokens": 17, **init}, shape, seed, **options)


REAL = {"ablate_complex": True}
STILL = {"ablate_state_transition": True}
HEADS = {"dim_head": 6, "heads": 3}
ATTENTION = {"dim": 10, "depth": 2, "ff_mult": 1, "use_gate_looped_attn": False, "dim_head": 4, "heads": 2}
TINY_GATES = {"to_qkv.weight": 1e3, "to_gates.0.weight": 1e3, "to_a.0.bias": 1e-3}
POSITION = {"data_dependent_rel_pos": True}

CASES = {
    "gate_ablate_both": gate((2, 29), 1, {"dim": 12, "heads": 4}, call=REAL | STILL),
    "gate_sub_ln_no_swish_inner": gate(
        (2, 31), 2, {"dim": 12, "dim_inner": 20, "heads": 5, "sub_ln": True, "add_swish_gating": False}
    ),
    "gate_length64": gate((2, 64), 3, {"dim": 9, "heads": 3}),
    "gate_length65": gate((2, 65), 4, {"dim": 8, "heads": 2}),
    "gate_frac0": gate((2, 29), 5, {"dim": 12, "heads": 4, "frac_gradient_state_transition": 0.0}),
    "gate_identity_out_real": gate((3, 20), 6, {"dim": 12, "add_swish_gating": False}, call=REAL),
    "gate_large_input": gate((2, 29), 7, {"dim": 12, "heads": 2}, scale=10.0),
    # Gates within 1e-3 of z = 0, where the phase turns fastest; everything else of ordinary size.
    "gate_tiny_input": gate((2, 29), 8, {"dim": 12, "heads": 4}, scale=1e-3, gain=TINY_GATES),
    "gate_tiny_input_real": gate((2, 19), 9, {"dim": 12, "heads": 4}, call=REAL, scale=1e-3, gain=TINY_GATES),
    "attn_rotary_no_softmax": attention(
        (2, 33), 11, {"dim": 12, **HEADS, "rotary_emb": True, "softmax_normalize": False}
    ),
    "attn_rel_pos_swish_real": attention(
        (2, 33), 12, {"dim": 12, **HEADS, **POSITION, "add_swish_gating": True}, call=REAL, lean=True
    ),
    "attn_rel_pos_softmax_frac0": attention(
        (2, 33),
        13,
        {
            "dim": 12,
            **HEADS,
            **POSITION,
            "softmax_normalize": True,
            "frac_gradient_data_dependent_rel_pos": 0.0,
        },
        lean=True,
    ),
    "attn_rel_pos_rotary_frac1": attention(
        (2, 31),
        14,
        {"dim": 12, **HEADS, **POSITION, "rotary_emb": True, "frac_gradient_data_dependent_rel_pos": 1.0},
        lean=True,
    ),
    "attn_rel_pos_clamped": attention((2, 17), 15, {"dim": 12, **HEADS, **POSITION}),
    "attn_rel_pos_ablate_transition": attention((2, 33), 16, {"dim": 12, **HEADS, **POSITION}, call=STILL),
    "attn_everything_ablated": attention(
        (2, 21),
        17,
        {
            "dim": 12,
            **HEADS,
            **POSITION,
            "rotary_emb": True,
            "add_swish_gating": True,
            "softmax_normalize": True,
        },
        call=REAL | STILL,
    ),
    "attn_length1": attention((3, 1), 18, {"dim": 12, **HEADS, "rotary_emb": True}),
    "attn_large_input": attention((2, 33), 19, {"dim": 12, **HEADS}, scale=10.0),
    "simple_reverse_post_ln": simple("layer", (2, 37), 21, {"dim": 12, "reverse": True, "post_ln": True}),
    "simple_heinsen_post_ln": simple("layer", (2, 37), 22, {"dim": 12, "use_heinsen": True, "post_ln": True}),
    "simple_no_prenorm_reverse": simple("layer", (2, 37), 23, {"dim": 12, "prenorm": False, "reverse": True}),
    "simple_heinsen_reverse": simple("layer", (2, 33), 24, {"dim": 12, "use_heinsen": True, "reverse": True}),
    "simple_large_input": simple("layer", (1, 64), 25, {"dim": 12, "prenorm": False}, scale=10.0),
    "simple_tiny_input": simple("layer", (1, 65), 26, {"dim": 12}, scale=1e-3),
    "simple_cached_heinsen": simple("cached", (2, 41), 27, {"dim": 12, "use_heinsen": True}, pieces=(1, 16, 24)),
    "simple_cached_post_ln": simple("cached", (2, 41), 28, {"dim": 12, "post_ln": True}, pieces=(20, 20, 1)),
    "simple_cache": simple("cache", (2, 7), 29, {"dim": 12}),
    "simple_cache_heinsen": simple("cache", (2, 7), 30, {"dim": 12, "use_heinsen": True}),
    "simple_cache_post_ln_length1": simple("cache", (3, 1), 31, {"dim": 12, "post_ln": True}),
    "model_attention_post_ln": model((2, 19), 41, {**ATTENTION, "post_ln_norm": True}),
    "model_attention_rotary_rel_pos": model((2, 19), 42, {**ATTENTION, **POSITION, "rotary_emb": True}, lean=True),
    "model_attention_no_softmax_heads": model(
        (2, 19), 43, {**ATTENTION, "dim_head": 5, "heads": 3, "attn_softmax_normalize": False}
    ),
    "model_attention_frac_half": model(
        (2, 19), 44, {**ATTENTION, **POSITION, "frac_gradient_state_transition": 0.5}, lean=True
    ),
    "model_attention_rel_pos_still": model(
        (2, 19),
        45,
        {**ATTENTION, **POSITION, "attn_add_swish_gating": False, "ablate_state_transition": True},
    ),
    "model_ablate_transition": model(
        (2, 19),
        46,
        {"dim": 12, "depth": 2, "ff_mult": 1, "gate_loop_heads": 3, "ablate_state_transition": True},
    ),
    "model_depth3": model((2, 29), 68, {"dim": 8, "depth": 3, "ff_mult": 2, "gate_loop_heads": 4}),
    "model_frac0_sub_ln_post_ln": model(
        (2, 19),
        48,
        {
            "dim": 10,
            "depth": 2,
            "ff_mult": 1,
            "sub_ln": True,
            "post_ln_norm": True,
            "frac_gradient_state_transition": 0.0,
        },
    ),
}


def draw_parameters(module: nn.Module, case: Case) -> None:
    """Matrices of unit gain; norms and biases moved off their start, so that all of them show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if "token_emb" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.mul_(case.gain.get(name, 1.0))
            if case.lean and name.endswith("to_a.0.weight"):
                parameter.mul_(0.3)
                parameter[0::2, 0] += 0.6
            if case.lean and name.endswith("token_emb.weight"):
                parameter[:, 0] = 3.0


def draw_input(module: nn.Module, case: Case) -> Tensor:
    """The input (B, T, dim) of a layer."""
    x = torch.randn(*case.shape, case.init["dim"]) * case.scale
    if case.lean:
        x[..., 0] = 3.0
    return x


def gradients(module: nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    """All gradients there are, by the names they are recorded under."""
    found = {f"grad:{name}": tensor.grad for name, tensor in tensors.items()}
    found |= {f"grad:param:{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def record_layer(module: nn.Module, case: Case) -> dict[str, Tensor]:
    """in:x → out:y, with gradients."""
    x = draw_input(module, case).requires_grad_()
    y = module(x, **case.call)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    return {"in:x": x, "out:y": y, "weight": weight, **gradients(module, x=x)}


def record_model(module: nn.Module, case: Case) -> dict[str, Tensor]:
    """in:ids → out:logits, out:loss, with the loss's gradients."""
    ids = torch.randint(case.init["num_tokens"], case.shape)
    logits = module(ids, **case.call)
    loss = module(ids, return_loss=True, **case.call)
    loss.backward()
    return {"in:ids": ids, "out:logits": logits, "out:loss": loss, **gradients(module)}


def record_cached(module: nn.Module, case: Case) -> dict[str, Tensor]:
    """in:x in pieces through the cache → out:y."""
    x = draw_input(module, case)
    pieces, cache = [], None
    for piece in x.split(case.pieces, dim=1):
        y, cache = module(piece, cache=cache, return_cache=True)
        pieces.append(y)
    return {"in:x": x, "out:y": torch.cat(pieces, 1)}


def record_cache(module: nn.Module, case: Case) -> dict[str, Tensor]:
    """in:x after a given cache → out:y and the cache it leaves, with gradients."""
    x = draw_input(module, case).requires_grad_()
    cache_a = torch.rand(x.shape[0] * x.shape[2], 1)
    cache_kv = torch.randn_like(cache_a).requires_grad_()
    y, (out_a, out_kv) = module(x, cache=(cache_a, cache_kv), return_cache=True)
    weight, weight_kv = torch.randn_like(y), torch.randn_like(out_kv)
    ((y * weight).sum() + (out_kv * weight_kv).sum()).backward()
    return {
        "in:x": x,
        "in:cache_a": cache_a,
        "in:cache_kv": cache_kv,
        "out:y": y,
        "out:cache_a": out_a,
        "out:cache_kv": out_kv,
        "weight": weight,
        "weight:cache_kv": weight_kv,
        **gradients(module, x=x, cache_kv=cache_kv),
    }


RECORDERS = {
    "layer": record_layer,
    "model": record_model,
    "cached": record_cached,
    "cache": record_cache,
}


def record(case: Case) -> dict[str, Any]:
    """The arrays of one case's file."""
    torch.manual_seed(case.seed)
    module = getattr(gateloop_transformer, case.cls)(**case.init)
    draw_parameters(module, case)
    tensors = {f"param:{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    tensors |= RECORDERS[case.kind](module, case)
    meta = {"kind": case.kind, "cls": case.cls, "init": case.init}
    meta |= {"pieces": case.pieces} if case.kind == "cached" else {"call": dict(case.call)}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return {"meta": json.dumps(meta), **{name: tensor.detach().numpy() for name, tensor in tensors.items()}}


def main() -> None:
    """Record all cases."""
    parser = argparse.ArgumentParser(description="Record cases of the original.")
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    installed = distribution("gateloop-transformer")
    imported = Path(str(gateloop_transformer.__file__))
    if installed.version != ORIGINAL or imported != installed.locate_file("gateloop_transformer/__init__.py"):
        raise SystemExit(f"needs gateloop-transformer=={ORIGINAL}, found {installed.version} and {imported}")
    out.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        np.savez_compressed(out / f"own_{name}.npz", **record(case))


if __name__ == "__main__":
    main()
