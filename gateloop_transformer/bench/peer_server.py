"""Runs in the peers' own environment, as a file: builds what it is told to, and times it run by run.

One JSON object a line. In: {"make": {...}}, {"run": number} of what was made in turn, from 0, or {"clear": true}, which
forgets all of it; out: {"ok": true}, {"seconds": s} or {"error": text}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def _trained(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor], backward: bool) -> Callable[[], None]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                call(*tensors)

        return forward
    leaves = [tensor.requires_grad_() for tensor in tensors]
    grad: list[torch.Tensor] = []

    def both() -> None:
        y = call(*leaves)
        if not grad:
            grad.append(torch.randn_like(y))
        y.backward(grad[0])

    return both


def _scan(what: str, B: int, T: int, D: int) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    if what == "mambapy":
        pscan: Any = importlib.import_module("mambapy.pscan").pscan
        return pscan, [torch.rand(B, T, D, 1), torch.randn(B, T, D, 1)]
    package = importlib.import_module("gateloop_transformer.simplified_gate_loop")
    heinsen = what == "original heinsen"

    def operator(q: torch.Tensor, kv: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        result = package.gate_loop_operator(q, kv, a.sigmoid(), heinsen=heinsen)
        y: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return y

    return operator, [torch.randn(B, T, D) for _ in range(3)]


def _gate_operator(B: int, T: int, D: int) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    package = importlib.import_module("gateloop_transformer.gateloop_transformer")

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)))
        a = torch.polar(pairs.abs().sigmoid(), pairs.angle())
        heads = [x.transpose(1, 2).reshape(B * D, T, 1) for x in (q, k, v)]
        y: torch.Tensor = package.gate_loop_operator(*heads, a.transpose(1, 2).reshape(B * D, T, 1, 1))
        return y

    return operator, [*(torch.randn(B, T, D) for _ in range(3)), torch.randn(B, T, 2 * D)]


def _mamba(D: int, options: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build Hugging Face's Mamba layer with its own defaults: inner width 2·D, state size 16, no downloaded kernels."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    modeling = importlib.import_module("transformers.models.mamba.modeling_mamba")
    layer: Callable[[torch.Tensor], torch.Tensor] = modeling.MambaMixer(
        transformers.MambaConfig(hidden_size=D, **options), layer_idx=0
    )
    return layer


def _make(what: str, shape: list[int], dtype: str, backward: bool, options: dict[str, Any]) -> Callable[[], None]:
    torch.manual_seed(0)
    B, T, D = shape
    if what == "gate operator":
        return _trained(*_gate_operator(B, T, D), backward)
    if what in ("mambapy", "original", "original heinsen"):
        return _trained(*_scan(what, B, T, D), backward)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    if what == "model":
        package = importlib.import_module("gateloop_transformer")
        model = package.Transformer(D, num_tokens=256, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(256, (B, T + 1))

        def step() -> None:
            with autocast:
                loss = model(ids, return_loss=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step
    if what == "mamba":
        layer = _mamba(D, options)
    else:
        layer = getattr(importlib.import_module("gateloop_transformer"), what)(D, **options)

    def call(x: torch.Tensor) -> torch.Tensor:
        with autocast:
            y: torch.Tensor = layer(x)
        return y

    return _trained(call, [torch.randn(B, T, D)], backward)


def main() -> None:
    """Answer until the input ends."""
    made: list[Callable[[], None]] = []
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"ok": True}
        try:
            if "clear" in request:
                made.clear()
            elif "make" in request:
                made.append(_make(**request["make"]))
            else:
                run = made[request["run"]]
                start = time.perf_counter()
                run()
                answer = {"seconds": time.perf_counter() - start}
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its result)
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    main()
