"""How a task is trained and tested, as a dataclass; the command line's flags are its fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateloop_transformer.configuration import TransformerConfig, option
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.tasks.task import Task, test_rows

# What all tasks start from; a task's own settings come after, then those of the kind of model, then what is asked for.
GENERAL: dict[str, Any] = {
    "dim": 64,
    "depth": 2,
    "gate": "ring",
    "gate_loop_heads": 8,
    "head_norm": True,
    "conv_size": 4,
}

# Kinds, and the settings that make them what they are.
MODELS: dict[str, dict[str, Any]] = {
    "gateloop": {},
    "transformer": {
        "use_gate_looped_attn": False,
        "rotary_emb": True,
        "attn_add_swish_gating": False,
        "heads": 4,
        "dim_head": 16,
        "weight_decay": 0.1,
    },
    "lstm": {"weight_decay": 0.1},
    "gru": {"weight_decay": 0.1},
}


# What nn.LSTM and nn.GRU read of a model's settings, and what a Transformer of attention layers alone does not.
_OF_NETS = {"dim", "depth", "dropout"}
_OF_GATES = {
    *("gate", "gate_loop_heads", "dim_gate_looped_attn", "sub_ln", "head_norm", "conv_size", "conv_silu", "qkv_bias"),
    *("max_memory", "min_memory", "phase_spread", "spread_start", "gate_rank", "fixed_gates"),
    *("ablate_complex", "ablate_state_transition"),
}
# Sequences of a test are drawn at once: 4 GB of them.
_MOST_TOKENS = 2**28


def check_read(kind: str, given: Mapping[str, Any]) -> None:
    """Check that this kind of model reads all settings that are given.

    Raises:
        ValueError: it does not read one of them.
    """
    fields = {item.name for item in dataclasses.fields(TransformerConfig)}
    unread: set[str] = set()
    if kind in ("lstm", "gru"):
        unread = (fields - _OF_NETS) & given.keys()
    elif kind == "transformer" and "gate" not in str(given.get("layer_pattern")).split():
        unread = _OF_GATES & given.keys()
    if unread:
        raise ValueError(f"model {kind} has no {', '.join(sorted(unread))}")


def defaults(task: type[Task], model: str = "gateloop") -> dict[str, Any]:
    """The settings of a task's model and training that differ from the dataclasses' defaults."""
    return {**GENERAL, **task.settings, **MODELS[model]}


@dataclass(frozen=True)
class TaskTraining:
    """A curriculum of lengths, and a learning rate that falls to 0 once the longest are solved."""

    model: str = option(
        "gateloop",
        "gate loop layers, attention layers, or torch's LSTM or GRU",
        ("gateloop", "transformer", "lstm", "gru"),
        common=True,
    )
    steps: int = option(4000, "optimizer steps at most", common=True)
    seconds: float | None = option(
        None,
        "stop after this much training time too; the learning rate follows it, and the first step, in which kernels "
        "are compiled, does not count",
        common=True,
    )
    tokens: int = option(2560, "tokens in a step, about: sequences are the fewer the longer they are")
    least_rows: int = option(16, "sequences in a step at least")
    first: int | None = option(None, "longest sequences at the start, in tokens; none: the task's shortest, at least 4")
    longest: int | None = option(None, "longest sequences trained on, in tokens; none: as the task says", common=True)
    growth: float = option(1.25, "factor by which the longest grow each time they are solved")
    solved: float = option(0.98, "running average of the share of right answers at which a length counts as solved")
    lr: float = option(
        5e-3, "peak learning rate, at length 4: it falls with the square root of the length", common=True
    )
    gate_lr: float = option(0.3, "learning rate of gate parameters as a fraction of the others'")
    weight_decay: float = option(0.1, "of matrices, gates and embeddings excepted")
    beta2: float = option(0.99, "of AdamW")
    clip: float = option(1.0, "largest norm of a step's gradient")
    smoothing: float = option(0.0, "label smoothing: what is drawn back from answers that are sure")
    decay: float = option(
        0.5, "fraction of the steps in which the learning rate falls to 0, from when the longest are solved or sooner"
    )
    seed: int = option(0, "of weights, sequences and dropout", common=True)
    lengths: str | None = option(None, "lengths to test, as 40,256,10000; none: as the task says", common=True)
    rows: int = option(256, "sequences of each length in a test; 64 of those above 2,000 tokens")

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("steps", "tokens", "least_rows", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        rules = (
            (
                self.seconds is None or 0 < self.seconds < math.inf,
                "seconds must be finite and above 0",
                self.seconds,
            ),
            (1 < self.growth < math.inf, "growth must be finite and above 1", self.growth),
            (0 < self.solved < 1, "solved must be in (0, 1)", self.solved),
            (0 < self.decay <= 1, "decay must be in (0, 1]", self.decay),
            (0 <= self.smoothing < 1, "smoothing must be in [0, 1)", self.smoothing),
        )
        for fine, rule, value in rules:
            if not fine:
                raise ValueError(f"{rule}, not {value}")
        self.optimizer()

    def optimizer(self) -> TrainingConfig:
        """The optimizer's settings as a configuration of `gateloop train`."""
        return TrainingConfig(
            lr=self.lr,
            gate_lr=self.gate_lr,
            weight_decay=self.weight_decay,
            beta2=self.beta2,
            clip=self.clip,
            seed=self.seed,
        )

    def trained_lengths(self, task: Task) -> tuple[int, int]:
        """The longest sequences at the start and at the end of training.

        Raises:
            ValueError: the task has no sequences so short, or the start is beyond the end.
        """
        longest = task.trained if self.longest is None else self.longest
        own = max(4, task.shortest) if task.grows else longest
        first = min(own, longest) if self.first is None else self.first
        if not task.shortest <= first <= longest:
            raise ValueError(
                f"{task.name}: lengths must go from at least {task.shortest} upwards, not from {first} to {longest}"
            )
        return first, longest

    def tested_lengths(self, task: Task) -> tuple[int, ...]:
        """The lengths to test, in ascending order.

        Raises:
            ValueError: it is not a list of lengths, the task does not have one of them, or a test has too many tokens.
        """
        if self.lengths is None:
            lengths = [length for length in task.tested if length >= task.shortest]
        else:
            try:
                lengths = sorted({int(word) for word in self.lengths.split(",")})
            except ValueError:
                raise ValueError(f"lengths must be numbers and commas, as 40,256,10000, not {self.lengths!r}") from None
        for length in lengths:
            if length < task.shortest:
                raise ValueError(f"lengths: {task.name} has none below {task.shortest}, not {length}")
            task.check(1, length)
            rows = test_rows(self.rows, length)
            if rows * length > _MOST_TOKENS:
                raise ValueError(
                    f"lengths: a test of {rows:,} sequences of {length:,} tokens is too large: rows times length must "
                    f"be at most {_MOST_TOKENS:,}"
                )
        return tuple(lengths)
