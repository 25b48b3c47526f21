"""Recorded cases of the original (0.2.5): same weights, same numbers, same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gateloop_transformer
from gateloop_transformer.ops import associative_scan, gate_loop

CASES = sorted((Path(__file__).parent / "recorded" / "parity").glob("*.npz"))
TOLERANCE = 2e-4


def relative_error(result: torch.Tensor, expected: np.ndarray[Any, Any]) -> float:
    reference = torch.from_numpy(expected)
    scale = max(reference.abs().max().item(), 1e-3)
    return (result.detach() - reference).abs().max().item() / scale


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    arrays = dict(np.load(path))
    return json.loads(str(arrays.pop("meta"))), arrays


def build(meta: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> torch.nn.Module:
    module = getattr(gateloop_transformer, meta["cls"])(**meta["init"])
    weights = {key[6:]: torch.from_numpy(x) for key, x in arrays.items() if key.startswith("param:")}
    module.load_state_dict(weights, strict=True)
    return module


def check_gradients(module: torch.nn.Module, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    for name, parameter in module.named_parameters():
        expected = arrays.get(f"grad:param:{name}")
        if expected is not None:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert relative_error(grad, expected) <= TOLERANCE, name
        elif parameter.grad is not None:
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("path", [p for p in CASES if not p.name.startswith("op_")], ids=lambda p: p.stem)
def test_module_equals_the_original(path: Path) -> None:
    meta, arrays = load(path)
    module = build(meta, arrays)
    if meta["kind"] == "layer":
        x = torch.from_numpy(arrays["in:x"]).requires_grad_()
        y = module(x, **meta["call"])
        assert relative_error(y, arrays["out:y"]) <= TOLERANCE
        (y * torch.from_numpy(arrays["weight"])).sum().backward()
        assert x.grad is not None
        assert relative_error(x.grad, arrays["grad:x"]) <= TOLERANCE
        check_gradients(module, arrays)
    elif meta["kind"] == "model":
        ids = torch.from_numpy(arrays["in:ids"])
        assert relative_error(module(ids, **meta["call"]), arrays["out:logits"]) <= TOLERANCE
        loss = module(ids, return_loss=True, **meta["call"])
        assert relative_error(loss, arrays["out:loss"]) <= TOLERANCE
        loss.backward()
        check_gradients(module, arrays)
    elif meta["kind"] == "cache":
        x, cache_kv = (torch.from_numpy(arrays[f"in:{name}"]).requires_grad_() for name in ("x", "cache_kv"))
        cache = torch.from_numpy(arrays["in:cache_a"]), cache_kv
        y, (out_a, out_kv) = module(x, cache=cache, return_cache=True, **meta["call"])
        for name, result in {"y": y, "cache_a": out_a, "cache_kv": out_kv}.items():
            assert relative_error(result, arrays[f"out:{name}"]) <= TOLERANCE, name
        weight, weight_kv = (torch.from_numpy(arrays[name]) for name in ("weight", "weight:cache_kv"))
        ((y * weight).sum() + (out_kv * weight_kv).sum()).backward()
        for name, tensor in {"x": x, "cache_kv": cache_kv}.items():
            assert tensor.grad is not None, name
            assert relative_error(tensor.grad, arrays[f"grad:{name}"]) <= TOLERANCE, name
        check_gradients(module, arrays)
    else:
        assert meta["kind"] == "cached"
        pieces, cache = [], None
        for piece in torch.from_numpy(arrays["in:x"]).split(meta["pieces"], dim=1):
            y, cache = module(piece, cache=cache, return_cache=True)
            pieces.append(y)
        assert relative_error(torch.cat(pieces, 1), arrays["out:y"]) <= TOLERANCE


@pytest.mark.parametrize("path", [p for p in CASES if p.name.startswith("op_gate")], ids=lambda p: p.stem)
def test_gate_loop_equals_the_original(path: Path) -> None:
    _, arrays = load(path)
    q, k, v, a = (torch.from_numpy(arrays[f"in:{name}"]).requires_grad_() for name in "qkva")
    y, _ = gate_loop(q[:, :, None], k[:, :, None], v[:, :, None], a[:, :, :, 0])
    assert relative_error(y[:, :, 0], arrays["out:y"]) <= TOLERANCE
    (y[:, :, 0] * torch.from_numpy(arrays["weight"])).sum().backward()
    for name, tensor in zip("qkva", (q, k, v, a), strict=True):
        assert tensor.grad is not None
        # A gate of one step has no past to act on: the original records no gradient for it.
        expected = arrays.get(f"grad:{name}", np.zeros_like(arrays[f"in:{name}"]))
        assert relative_error(tensor.grad, expected) <= TOLERANCE


@pytest.mark.parametrize("path", [p for p in CASES if p.name.startswith("op_assoc")], ids=lambda p: p.stem)
def test_associative_scan_equals_the_original(path: Path) -> None:
    _, arrays = load(path)
    a, x = torch.from_numpy(arrays["in:a"]), torch.from_numpy(arrays["in:x"])
    product, h = associative_scan(lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1]), (a, x))
    assert relative_error(product, arrays["out:a"]) <= TOLERANCE
    assert relative_error(h, arrays["out:h"]) <= TOLERANCE
