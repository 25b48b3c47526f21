"""What a run needs, as numbers and in words: `estimate` fills them in."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gateloop_transformer.runs.config import TrainingConfig


@dataclass(frozen=True)
class Spread:
    """How a run is spread: `processes` in all, each sequence over `context_parallel` of them; sharded: FSDP2, not DDP.

    The windows of a step are shared out among the processes / context_parallel replicas.
    """

    processes: int = 1
    context_parallel: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be shared out."""
        if min(self.processes, self.context_parallel) < 1 or self.processes % self.context_parallel:
            raise ValueError(
                f"processes must be a multiple of context_parallel, both at least 1, not {self.processes} and "
                f"{self.context_parallel}"
            )

    def windows(self, options: TrainingConfig) -> tuple[int, int]:
        """Windows that a process holds at once, and its micro-batches in a step."""
        share = math.ceil(options.windows / (self.processes // self.context_parallel))
        micro = math.ceil(share / options.batch)
        return math.ceil(share / micro), micro


@dataclass(frozen=True)
class Operations:
    """Floating point operations for a token of the forward pass, and of a training step (`training`).

    A multiplication and an addition are two; functions (exp, cos), norms and other work on single numbers are left out.
    """

    products: float
    recurrence: float
    attention: float
    training: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `total` is the largest sum at a time, not the sum of all.

    average: of the weights (EMA). copies: of the weights in bfloat16. activations: what all layers keep for the
    backward pass. logits: of the loss, forward and backward. buffers: of DDP's gradients or FSDP2's gathered weights.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    copies: int
    activations: int
    logits: int
    buffers: int
    total: int


@dataclass(frozen=True)
class Communication:
    """Bytes that one process sends in a step.

    gradients: all-reduced (DDP) or reduced and scattered (FSDP2). weights: gathered for the forward and the backward
    pass of each micro-batch (FSDP2). states: what context parallel exchanges: of gate loops whatever the length, of
    attention all keys and values.
    """

    gradients: int
    weights: int
    states: int


@dataclass(frozen=True)
class Estimate:
    """What a run needs. steps and tokens are None where minutes decide."""

    parameters: int
    vocabulary: int
    tokens_per_step: int
    steps: int | None
    spread: Spread
    operations: Operations
    memory: Memory
    communication: Communication

    @property
    def flops_per_step(self) -> float:
        """Of all processes together."""
        return self.operations.training * self.tokens_per_step

    @property
    def tokens(self) -> int | None:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        flops = None if self.steps is None else self.flops_per_step * self.steps
        more = {"tokens": self.tokens, "flops_per_step": self.flops_per_step, "flops": flops}
        return {**dataclasses.asdict(self), **more}

    def describe(self) -> list[str]:
        """A few lines: parameters; memory; operations; communication, where there are several processes."""
        memory, work = self.memory, self.flops_per_step
        parts = {name: value for name, value in vars(memory).items() if name != "total" and value}
        held = ", ".join(f"{name} {_amount(value, 'B')}" for name, value in parts.items())
        each = " for each process" if self.spread.processes > 1 else ""
        lines = [
            f"{self.parameters:,} parameters, {_amount(self.parameters)} (vocabulary: {self.vocabulary:,})",
            f"memory: about {_amount(memory.total, 'B')}{each} at the peak ({held}, not all at once)",
            f"work: {_amount(self.operations.training, 'FLOP')} for a token, {_amount(work, 'FLOP')} for a step "
            f"of {self.tokens_per_step:,} tokens",
        ]
        if self.steps is not None:
            lines[-1] += f", {_amount(work * self.steps, 'FLOP')} in all ({_amount(self.tokens or 0)} tokens)"
        sent = {name: value for name, value in vars(self.communication).items() if value}
        if sent:
            engine = "FSDP2" if self.spread.sharded else "DDP"
            each = ", ".join(f"{name} {_amount(value, 'B')}" for name, value in sent.items())
            lines.append(f"sent by each of {self.spread.processes} processes in a step ({engine}): {each}")
        return lines


def _amount(number: float, unit: str = "") -> str:
    """Three digits and a prefix: "1.25 GB".

    >>> _amount(1_250_000_000, "B"), _amount(999.6), _amount(0)
    ('1.25 GB', '1 k', '0')
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    if not unit:
        prefixes[3] = "B"
    power = 0
    while float(f"{number:.3g}") >= 1000 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {prefixes[power]}{unit}".strip()
