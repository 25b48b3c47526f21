"""Prints what a run needs, before it starts or instead of starting it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    from gateloop_transformer.runs.config import RunConfig
    from gateloop_transformer.training.loop import Trainer

_ESTIMATING = "estimating what the run needs"


def print_needs(config: RunConfig, processes: int, as_json: bool) -> None:
    """Print what a run would need; with several processes also for the other way of sharing the weights.

    Raises:
        ValueError: a setting is out of range.
    """
    from gateloop_transformer.training.estimate import estimate
    from gateloop_transformer.training.needs import Spread

    device = "cuda" if _on_cuda(config.training.device) else "cpu"
    ranks = config.training.context_parallel
    sharded = config.training.parallel == "fsdp"
    with waiting(_ESTIMATING):
        found = estimate(config, Spread(processes, ranks, sharded and processes > 1), device=device)
        other = estimate(config, Spread(processes, ranks, not sharded), device=device) if processes > 1 else None
    name = "ddp" if sharded else "fsdp"
    if as_json:
        print(json.dumps({**found.to_json(), **({} if other is None else {name: other.to_json()})}))
        return
    print("\n".join(found.describe()))
    if other is not None:
        _, memory, _, *sent = other.describe()
        print("\n".join([f"with --parallel {name}:", *("  " + line for line in (memory, *sent))]))


def needs_of(trainer: Trainer) -> list[str]:
    """Lines about a run whose model is built: its memory and work, and a warning where memory is too small."""
    from gateloop_transformer.training.estimate import available_memory, estimate
    from gateloop_transformer.training.needs import Spread

    engine = trainer.engine
    spread = Spread(engine.size, engine.context_size, engine.fsdp)
    with waiting(_ESTIMATING):
        found = estimate(trainer.config, spread, device="cuda" if trainer.device.type == "cuda" else "cpu")
    lines = found.describe()[1:]
    available = available_memory(trainer.device)
    needed = found.memory.total - found.memory.weights
    if available is not None and needed > available:
        lines.append(
            f"warning: this may not fit: {needed / 1e9:.1f} GB more are needed, {available / 1e9:.1f} GB are available "
            "(a smaller --batch with a larger --accumulate takes less)"
        )
    return lines


def _on_cuda(device: str) -> bool:
    import torch

    return torch.cuda.is_available() and device.split(":")[0] in ("auto", "cuda")
