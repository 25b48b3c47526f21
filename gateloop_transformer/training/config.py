"""Everything a run is made of, as dataclasses; the command line's flags are these fields."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

FORMAT = 2


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, since: int = 1) -> Any:
    """A dataclass field with the text that the command line shows for it.

    `since`: the first format that has it; files of an earlier one mean the default.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "since": since})


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `Transformer`, in its words; the vocabulary is the 256 bytes."""

    dim: int = option(128, "width")
    depth: int = option(4, "number of blocks")
    dim_head: int = option(64, "size of an attention head")
    heads: int = option(8, "number of attention heads")
    ff_mult: int = option(4, "inner width of the feed-forward, as a multiple of the width")
    use_gate_looped_attn: bool = option(True, "gate loop layers rather than attention layers")
    gate_loop_heads: int | None = option(None, "heads of a gate loop layer; none: as many as its width")
    attn_add_swish_gating: bool = option(True, "SiLU gate on the output of each time mixer")
    dim_gate_looped_attn: int | None = option(None, "inner width of the gate loop layers; none: the width")
    attn_softmax_normalize: bool | None = option(None, "softmax in attention; none: unless relative positions")
    data_dependent_rel_pos: str = option(
        "none", "relative position of attention layers", ("none", "released", "gate_loop")
    )
    frac_gradient_state_transition: float = option(0.9, "factor on the gradient into the gate projections")
    ablate_complex: bool = option(False, "real gates only")
    ablate_state_transition: bool = option(False, "all gates 1")
    rotary_emb: bool = option(False, "rotary position embedding in attention layers")
    post_ln_norm: bool = option(False, "LayerNorm after each residual instead of RMSNorm before each layer")
    sub_ln: bool = option(False, "LayerNorm on the merged heads")
    layer_pattern: str | None = option(None, "mixers in turn, such as 'gate gate attention'; none: all alike")
    gate: str = option("polar", "kind of gate", ("polar", "paper", "ring"))
    head_norm: bool = option(False, "RMS norm on the output of each gate loop head")
    qk_norm: bool = option(False, "RMS norm on queries and keys")
    conv_size: int = option(0, "taps of the causal convolution in gate loop layers; 0: none")
    max_memory: float = option(1024, "longest memory that ring gates start with, in steps")
    attn_window: int | None = option(None, "steps that attention layers see at most; none: all", since=2)
    dropout: float = option(0.0, "probability of dropping an element of what a block adds")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `Transformer`."""
        values = {"num_tokens": 256, **dataclasses.asdict(self)}
        values["data_dependent_rel_pos"] = {"none": False, "released": True, "gate_loop": "gate_loop"}[
            self.data_dependent_rel_pos
        ]
        return values


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained and watched."""

    steps: int = option(1000, "optimizer steps")
    minutes: float | None = option(None, "stop after this much training time instead; the schedule follows it")
    context: int = option(256, "bytes in a training window")
    batch: int = option(16, "windows in a micro-batch")
    accumulate: int = option(1, "micro-batches in a step")
    lr: float = option(3e-3, "peak learning rate")
    min_lr: float = option(0.1, "final learning rate as a fraction of the peak")
    gate_lr: float = option(0.5, "learning rate of gate parameters as a fraction of the others'")
    warmup: float = option(0.05, "fraction of the run in which the learning rate rises")
    weight_decay: float = option(0.1, "of matrices, gates and embeddings excepted")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    clip: float = option(1.0, "largest norm of a step's gradient")
    precision: str = option("float32", "of matrix products (autocast)", ("float32", "bf16"))
    seed: int = option(0, "of weights, batches and dropout")
    device: str = option("auto", "auto, cpu, cuda, ...")
    valid_fraction: float = option(0.1, "share of the data held out for validation")
    eval_every: int = option(200, "steps between validations")
    eval_bytes: int = option(65536, "bytes of validation data used")
    sample_bytes: int = option(160, "length of the sample text at each validation; 0: none")
    checkpoint_every: int = option(100, "steps between checkpoints")
    keep: int = option(2, "how many checkpoints to keep")
    carry_state: bool = option(
        False, "windows follow each other in the text, each from the state that the one before ended with", since=2
    )

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        positive = ("steps", "context", "batch", "accumulate", "eval_every", "checkpoint_every", "keep")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        rules = (
            (0 < self.lr < math.inf, "lr must be finite and above 0", self.lr),
            (
                self.minutes is None or 0 < self.minutes < math.inf,
                "minutes must be finite and above 0",
                self.minutes,
            ),
            (0 <= self.min_lr <= 1, "min_lr must be in [0, 1]", self.min_lr),
            (0 < self.gate_lr <= 1, "gate_lr must be in (0, 1]", self.gate_lr),
            (0 <= self.warmup < 1, "warmup must be in [0, 1)", self.warmup),
            (0 <= self.weight_decay < math.inf, "weight_decay must be finite, 0 or more", self.weight_decay),
            (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "betas must be in [0, 1)", (self.beta1, self.beta2)),
            (self.clip > 0, "clip must be above 0", self.clip),
            (0 <= self.seed < 2**64, "seed must be in [0, 2**64)", self.seed),
            (0 < self.valid_fraction < 1, "valid_fraction must be in (0, 1)", self.valid_fraction),
            (self.eval_bytes >= 2, "eval_bytes must be at least 2", self.eval_bytes),
            (self.sample_bytes >= 0, "sample_bytes must be 0 or more", self.sample_bytes),
        )
        for fine, rule, value in rules:
            if not fine:
                raise ValueError(f"{rule}, not {value}")


@dataclass(frozen=True)
class RunConfig:
    """One run: what is trained, how, and on which data (None: the Python standard library's sources; with its hash)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: str | None = None
    data_sha256: str | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        model = self.model
        pattern = model.layer_pattern or ("gate" if model.use_gate_looped_attn else "attention")
        if self.training.carry_state and "attention" in pattern.split() and model.attn_window is None:
            raise ValueError("carry_state with attention layers needs an attn_window: their state grows without end")

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the format's number."""
        return {"format": FORMAT, "tokenizer": "bytes", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: Any, where: str) -> RunConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: a newer format, an unknown or missing entry, or a value of the wrong type.
        """
        if not isinstance(values, dict) or not isinstance(values.get("format"), int):
            raise ValueError(f"{where} is not the configuration of a run")
        if values["format"] > FORMAT:
            raise ValueError(
                f"{where} is of format {values['format']}, newer than this version of gateloop-transformer reads "
                f"({FORMAT}); install a newer one"
            )
        if values.get("tokenizer") != "bytes":
            raise ValueError(f"{where}: unknown tokenizer {values.get('tokenizer')!r}; there is only 'bytes'")
        data = values.get("data")
        digest = values.get("data_sha256")
        for entry in (data, digest):
            if not (entry is None or isinstance(entry, str)):
                raise ValueError(f"{where}: data and data_sha256 must be texts or null, not {entry!r}")
        version = values["format"]
        model = build(ModelConfig, values.get("model"), f"{where}, model", version)
        training = build(TrainingConfig, values.get("training"), f"{where}, training", version)
        return cls(model, training, data, digest)


Config = typing.TypeVar("Config", ModelConfig, TrainingConfig)


def value_types(kind: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a dataclass accepts."""
    hints = typing.get_type_hints(kind)
    return {
        item.name: typing.get_args(hint) if isinstance(hint := hints[item.name], types.UnionType) else (hint,)
        for item in dataclasses.fields(kind)
    }


def with_later_fields(kind: type, values: dict[str, Any], version: int) -> dict[str, Any]:
    """Values of a file of format `version` with the defaults of fields that came later."""
    later = {item.name: item.default for item in dataclasses.fields(kind) if item.metadata["since"] > version}
    return {**later, **values}


def build(kind: type[Config], values: Any, where: str, version: int = FORMAT) -> Config:
    """A dataclass from plain values of a file of format `version`, every field present and of its type.

    Raises:
        ValueError: an entry is unknown, missing, of the wrong type or outside the choices.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object with the fields of {kind.__name__}")
    values = with_later_fields(kind, values, version)
    accepted = value_types(kind)
    unknown, missing = sorted(set(values) - set(accepted)), sorted(set(accepted) - set(values))
    if unknown or missing:
        problems = [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        problems += [f"missing: {', '.join(missing)}"] * bool(missing)
        raise ValueError(f"{where}: {'; '.join(problems)}")
    for item in dataclasses.fields(kind):
        value, allowed = values[item.name], accepted[item.name]
        fits = type(value) in allowed or (float in allowed and type(value) is int)
        choices = item.metadata.get("choices")
        if not fits or (choices and value not in choices):
            names = choices or [getattr(each, "__name__", "none") for each in allowed]
            raise ValueError(f"{where}: {item.name} must be one of {', '.join(names)}, not {value!r}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


_GATED = {"gate": "ring", "conv_size": 4}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_GATED,
        "dim": 128,
        "depth": 4,
        "gate_loop_heads": 8,
        "head_norm": True,
        "max_memory": 256,
        "steps": 700,
        "context": 256,
        "batch": 8,
        "lr": 4e-3,
        "eval_every": 100,
    },
    "small": {
        **_GATED,
        "dim": 512,
        "depth": 6,
        "gate_loop_heads": 16,
        "head_norm": True,
        "max_memory": 512,
        "steps": 10000,
        "context": 512,
        "batch": 16,
        "lr": 1e-3,
        "eval_every": 500,
        "checkpoint_every": 500,
        "eval_bytes": 262144,
    },
    "paper": {
        "gate": "paper",
        "dim": 768,
        "depth": 14,
        "dropout": 0.1,
        "steps": 100000,
        "context": 512,
        "batch": 16,
        "lr": 6e-4,
        "gate_lr": 0.2,
        "eval_every": 1000,
        "checkpoint_every": 1000,
        "eval_bytes": 1048576,
    },
}
PRESET_HELP = (
    "tiny: 0.9 M parameters, minutes on a CPU; small: 23 M parameters; paper: 124 M parameters, as many heads as "
    "channels and the paper's gate"
)


def split_fields(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat settings as those of the model and those of the training."""
    names = {item.name for item in dataclasses.fields(ModelConfig)}
    model = {name: value for name, value in values.items() if name in names}
    return model, {name: value for name, value in values.items() if name not in names}


def resolve(preset: str, overrides: dict[str, Any], data: str | None) -> RunConfig:
    """A preset with some fields overridden.

    Raises:
        ValueError: an unknown preset, or a value without a meaning.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    model, training = split_fields({**PRESETS[preset], **overrides})
    return RunConfig(ModelConfig(**model), TrainingConfig(**training), data)
