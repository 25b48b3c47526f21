"""Everything a run is made of, as dataclasses; the command line's flags are these fields."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateloop_transformer.configuration import TransformerConfig, option, recipe_rank
from gateloop_transformer.nearest import did_you_mean
from gateloop_transformer.runs.presets import PRESETS

if TYPE_CHECKING:
    from gateloop_transformer.data.tokenizer import Tokenizer

FORMAT = 5
# What transformers knows a model by, in every config.json.
IDENTITY = {"model_type": "gateloop", "architectures": ["GateLoopForCausalLM"]}
# What transformers itself writes into a config.json.
FOREIGN = frozenset(
    {
        *("architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype"),
        *("eos_token_id", "id2label", "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels"),
        *("output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config"),
        *("return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"),
        *("_attn_implementation", "_commit_hash", "_name_or_path", "transformers_weights"),
    }
)
# What may change when a run is resumed: how long it goes on, how often it is looked at, and on what it runs.
RESUMABLE = (
    *("steps", "minutes", "eval_every", "checkpoint_every", "sample_bytes", "keep", "device", "skip_nonfinite"),
    *("parallel", "context_parallel", "track", "batch", "accumulate"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained and watched."""

    steps: int = option(1000, "optimizer steps", common=True)
    minutes: float | None = option(
        None,
        "stop after this much training time instead; the schedule follows it, and the first step, in which kernels are "
        "compiled, does not count",
        common=True,
    )
    context: int = option(256, "bytes in a training window", common=True)
    batch: int = option(16, "windows that a process works on at a time", common=True)
    accumulate: int = option(1, "so many times --batch windows are in a step, shared by all processes")
    lr: float = option(3e-3, "peak learning rate", common=True)
    min_lr: float = option(0.1, "final learning rate as a fraction of the peak")
    gate_lr: float = option(
        0.5, "learning rate of gate parameters as a fraction of the others'; 0: they stay as they start"
    )
    warmup: float = option(0.05, "fraction of the run in which the learning rate rises")
    schedule: str = option(
        "cosine",
        "after the warm-up: cosine falls to the end; wsd stays, then falls during the last part; constant stays",
        ("cosine", "wsd", "constant"),
    )
    decay: float = option(0.2, "fraction of the run in which the learning rate of wsd falls")
    weight_decay: float = option(0.1, "of matrices, gates and embeddings excepted")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    clip: float = option(1.0, "largest norm of a step's gradient")
    precision: str = option(
        "float32", "of matrix products (bf16: autocast), or of everything (float64)", ("float32", "bf16", "float64")
    )
    seed: int = option(0, "of weights, batches and dropout", common=True)
    device: str = option("auto", "auto, cpu, cuda, ...", common=True)
    valid_fraction: float = option(0.1, "share of the data held out for validation")
    eval_every: int = option(200, "steps between validations")
    eval_bytes: int = option(65536, "bytes of validation data used")
    sample_bytes: int = option(160, "length of the sample text at each validation; 0: none")
    checkpoint_every: int = option(100, "steps between checkpoints")
    keep: int = option(2, "how many checkpoints to keep")
    carry_state: bool = option(
        False, "windows follow each other in the text, each from the state that the one before ended with"
    )
    ema: float = option(0.0, "decay a step of an average of the weights, which is validated and published; 0: none")
    z_loss: float = option(0.0, "weight of the squared log-normaliser in the loss; 0: none")
    skip_nonfinite: int = option(0, "batches with a loss or gradient that is not finite to pass over in all")
    parallel: str = option("ddp", "each process has all weights (ddp), or a part of each (fsdp)", ("ddp", "fsdp"))
    context_parallel: int = option(1, "processes that share each window, a part of its time each")
    track: str = option(
        "auto",
        "where else metrics go; auto: to TensorBoard where that is installed",
        ("auto", "none", "tensorboard", "wandb", "trackio"),
    )

    @property
    def windows(self) -> int:
        """Windows in a step, of all processes."""
        return self.batch * self.accumulate

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        positive = (
            "steps",
            "context",
            "batch",
            "accumulate",
            "eval_every",
            "checkpoint_every",
            "keep",
            "context_parallel",
        )
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
            (0 <= self.gate_lr <= 1, "gate_lr must be in [0, 1]", self.gate_lr),
            (0 <= self.warmup < 1, "warmup must be in [0, 1)", self.warmup),
            (0 < self.decay <= 1, "decay must be in (0, 1]", self.decay),
            (
                self.schedule != "wsd" or self.warmup + self.decay <= 1,
                "warmup + decay must be at most 1 for the wsd schedule",
                self.warmup + self.decay,
            ),
            (0 <= self.weight_decay < math.inf, "weight_decay must be finite, 0 or more", self.weight_decay),
            (0 <= self.beta1 < 1, "beta1 must be in [0, 1)", self.beta1),
            (0 <= self.beta2 < 1, "beta2 must be in [0, 1)", self.beta2),
            (self.clip > 0, "clip must be above 0", self.clip),
            (0 <= self.seed < 2**64, "seed must be in [0, 2**64)", self.seed),
            (0 < self.valid_fraction < 1, "valid_fraction must be in (0, 1)", self.valid_fraction),
            (self.eval_bytes >= 2, "eval_bytes must be at least 2", self.eval_bytes),
            (self.sample_bytes >= 0, "sample_bytes must be 0 or more", self.sample_bytes),
            (0 <= self.ema < 1, "ema must be in [0, 1)", self.ema),
            (0 <= self.z_loss < math.inf, "z_loss must be finite, 0 or more", self.z_loss),
            (self.skip_nonfinite >= 0, "skip_nonfinite must be 0 or more", self.skip_nonfinite),
        )
        for fine, rule, value in rules:
            if not fine:
                raise ValueError(f"{rule}, not {value}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokens a model reads: bytes, or those of a BPE tokenizer.

    kind: "bytes" or "bpe". size: of the vocabulary. sha256: of the tokenizer.json in the run's folder; None: bytes.
    end: the token after each document; None: there is none.
    """

    kind: str = "bytes"
    size: int = 256
    sha256: str | None = None
    end: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerConfig:
        """What tells this tokenizer."""
        if tokenizer.kind == "bytes":
            return cls()
        return cls(tokenizer.kind, tokenizer.size, tokenizer.sha256, tokenizer.end)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `end` stands elsewhere, under transformers' name."""
        if self.kind == "bytes":
            return {"kind": "bytes"}
        return {"kind": self.kind, "size": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, values: Any, where: str) -> TokenizerConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown kind, or a value that is missing or of the wrong type.
        """
        if values == {"kind": "bytes"}:
            return cls()
        if not isinstance(values, dict) or values.get("kind") != "bpe":
            raise ValueError(f"{where}: unknown tokenizer {values!r}; there are 'bytes' and 'bpe'")
        if values.keys() != {"kind", "size", "sha256"} or [type(values[key]) for key in ("size", "sha256")] != [
            int,
            str,
        ]:
            raise ValueError(f"{where}: a BPE tokenizer has a kind, a size and a sha256, not {values!r}")
        return cls(**values)


@dataclass(frozen=True)
class RunConfig:
    """One run: what is trained, how, and on which data.

    data: as in `open_source`; None: the Python standard library's sources. data_sha256: of the corpus. field: of
    records, the one with the text, as in `open_source`. tokenizer: of the text.
    """

    model: TransformerConfig = field(default_factory=TransformerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: str | None = None
    data_sha256: str | None = None
    field: str | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        model = self.model
        if self.training.carry_state and "attention" in model.mixers() and model.attn_window is None:
            raise ValueError("carry_state with attention layers needs an attn_window: their state grows without end")

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the format's number, and what transformers knows a model by."""
        end = {} if self.tokenizer.end is None else {"eos_token_id": self.tokenizer.end}
        own = {**dataclasses.asdict(self), "tokenizer": self.tokenizer.to_json()}
        return {**IDENTITY, **end, "format": FORMAT, **own}

    @classmethod
    def from_json(cls, values: Any, where: str) -> RunConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: another format, an unknown or missing entry, or a value of the wrong type.
        """
        if is_flat(values):
            raise ValueError(f"{where} describes a model alone, not a run of 'gateloop train'")
        check_format(values, where)
        tokenizer = TokenizerConfig.from_json(values.get("tokenizer"), where)
        end = values.get("eos_token_id")
        if type(end) is int:
            tokenizer = dataclasses.replace(tokenizer, end=end)
        data, digest, name = (values.get(entry) for entry in ("data", "data_sha256", "field"))
        for entry in (data, digest, name):
            if not (entry is None or isinstance(entry, str)):
                raise ValueError(f"{where}: data, data_sha256 and field must be texts or null, not {entry!r}")
        model = build(TransformerConfig, values.get("model"), f"{where}, model")
        training = build(TrainingConfig, values.get("training"), f"{where}, training")
        return cls(model, training, data, digest, name, tokenizer)


def check_format(values: Any, where: str) -> None:
    """Check that a config.json is of the format that is written here.

    Raises:
        ValueError: it has none, or is of another.
    """
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{where} is not the configuration of a run")
    if version != FORMAT:
        writer = "a newer version" if version > FORMAT else "no release"
        raise ValueError(
            f"{where} is of format {version}, which {writer} of gateloop-transformer has written; this version reads "
            f"format {FORMAT} alone"
        )


def is_flat(values: Any) -> bool:
    """Whether a config.json is of a model alone, its fields on the first level, as transformers writes it."""
    return isinstance(values, dict) and values.get("model_type") == IDENTITY["model_type"] and "model" not in values


def flat(model: TransformerConfig, num_tokens: int) -> dict[str, Any]:
    """The config.json of a model alone; `read_flat` is the inverse."""
    return {**IDENTITY, "format": FORMAT, "vocab_size": num_tokens, **dataclasses.asdict(model)}


def read_flat(values: dict[str, Any], where: str) -> tuple[TransformerConfig, int]:
    """A model and the size of its vocabulary.

    Raises:
        ValueError: another format, an unknown entry, or a value of the wrong type.
    """
    check_format(values, where)
    size = values.get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{where}: vocab_size must be an integer of 1 or more, not {size!r}")
    own = {name: value for name, value in values.items() if name not in FOREIGN | {"format", "vocab_size"}}
    # What transformers' users leave out means the default.
    return build(TransformerConfig, {**dataclasses.asdict(TransformerConfig()), **own}, where), size


Config = typing.TypeVar("Config", TransformerConfig, TrainingConfig)


def value_types(kind: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a dataclass accepts."""
    hints = typing.get_type_hints(kind)
    return {
        item.name: typing.get_args(hint) if isinstance(hint := hints[item.name], types.UnionType) else (hint,)
        for item in dataclasses.fields(kind)
    }


def build(kind: type[Config], values: Any, where: str) -> Config:
    """A dataclass from plain values, every field present and of its type.

    Raises:
        ValueError: an entry is unknown, missing, of the wrong type or outside the choices.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object with the fields of {kind.__name__}")
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


def split_fields(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat settings as those of the model and those of the training."""
    names = {item.name for item in dataclasses.fields(TransformerConfig)}
    model = {name: value for name, value in values.items() if name in names}
    return model, {name: value for name, value in values.items() if name not in names}


def of_preset(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """Flat settings of a preset and what is given; the longest memory keeps its share of the context, and the rank of
    gates is that of the recipe for what is given.

    Raises:
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        near = did_you_mean(preset, PRESETS)
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}{near}")
    own, following = PRESETS[preset], {}
    if "max_memory" in own and given.get("context", 0) >= 1:
        following["max_memory"] = max(own["max_memory"] * given["context"] / own["context"], 2.0)
    if "gate_rank" in own:
        following["gate_rank"] = recipe_rank(given.get("dim", own["dim"]), given)
    return {**own, **following, **given}


# Of attention layers alone.
_ATTENTION = ("dim_head", "heads", "attn_softmax_normalize", "data_dependent_rel_pos", "rotary_emb", "attn_window")


def without_effect(config: RunConfig, given: Collection[str], processes: int = 1) -> dict[str, str]:
    """Which of the given settings change nothing in a run, and why.

    Args:
        config: of the run.
        given: names of settings.
        processes: that train.

    >>> without_effect(RunConfig(), ["decay", "dim"])
    {'decay': 'it is for --schedule wsd'}
    """
    model, training = config.model, config.training
    why: dict[str, str] = {}
    if "attention" not in model.mixers():
        why |= dict.fromkeys(_ATTENTION, "the model has no attention layers")
    if training.schedule != "wsd":
        why["decay"] = "it is for --schedule wsd"
    if training.parallel == "fsdp" and processes == 1:
        why["parallel"] = "one process holds all weights"
    return {name: reason for name, reason in why.items() if name in given}


def resolve(preset: str, overrides: dict[str, Any], data: str | None) -> RunConfig:
    """A preset with some fields overridden.

    Raises:
        ValueError: an unknown preset, or a value without a meaning.
    """
    model, training = split_fields(of_preset(preset, overrides))
    return RunConfig(TransformerConfig(**model), TrainingConfig(**training), data)
