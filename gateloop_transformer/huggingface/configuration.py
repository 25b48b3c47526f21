"""GateLoopConfig: the arguments of the Transformer as transformers wants them."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from gateloop_transformer.arguments import parse_pattern
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.runs.config import FOREIGN, FORMAT, IDENTITY, RunConfig, read_flat

_OWN = {item.name for item in dataclasses.fields(TransformerConfig)}
# Further fields that a configuration of transformers may hold.
_THEIRS = {item.name for item in dataclasses.fields(PreTrainedConfig)} | FOREIGN
# Fields that say where a configuration was read and what wrote it.
_ORIGIN = {"_name_or_path", "_commit_hash", "transformers_version"}


class GateLoopConfig(PreTrainedConfig):
    """Configuration of GateLoop models: the fields of `gateloop_transformer.TransformerConfig` and a vocabulary.

    Also goes by transformers' own names: hidden_size (dim), num_hidden_layers (depth), num_attention_heads (heads),
    sliding_window (attn_window). A config.json of `gateloop train` is read as well as one that transformers wrote.

    Args:
        vocab_size: number of tokens.
        use_cache: return the state for continuing.
        pad_token_id: the token of padding, for classification.
        bos_token_id: the token that generation starts from where it is given no prompt.
        eos_token_id: the token that ends generation.
        tie_word_embeddings: must be False: GateLoop's embedding and logits have weights of their own.
        format: of the configuration.
        kwargs: fields of TransformerConfig; and of PreTrainedConfig.

    Raises:
        ValueError: an unknown field, one given two values by two names, a value of the wrong type, another format, or
            tied embeddings.

    >>> GateLoopConfig(dim=64, depth=2, gate="ring").hidden_size
    64
    """

    model_type = IDENTITY["model_type"]
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "sliding_window": "attn_window",
    }

    def __init__(
        self,
        vocab_size: int = 256,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        for name, own_name in self.attribute_map.items():
            if name in kwargs and kwargs.get(own_name, kwargs[name]) != kwargs[name]:
                raise ValueError(
                    f"GateLoopConfig: {name} is another name of {own_name}, but they are {kwargs[name]!r} and "
                    f"{kwargs[own_name]!r}: give one of them"
                )
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        if tie_word_embeddings:
            raise ValueError("GateLoopConfig: tie_word_embeddings must be False: embedding and logits are two matrices")
        theirs = _THEIRS | set(GenerationConfig().to_dict())
        own = {name: value for name, value in kwargs.items() if name not in theirs}
        model, size = read_flat({**own, "format": format, "vocab_size": vocab_size}, "GateLoopConfig")
        for name, value in dataclasses.asdict(model).items():
            setattr(self, name, value)
        self.vocab_size, self.use_cache, self.format = size, use_cache, FORMAT
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = False
        # TRL asks for it; nothing here is loaded from a checkpoint's own code.
        self.auto_map: dict[str, Any] = {}
        super().__init__(**{name: value for name, value in kwargs.items() if name not in own})

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        """Keep the constructor and `__eq__`, which transformers would replace in a user's subclass."""
        own = set(vars(cls))
        super().__init_subclass__(*args, **kwargs)
        for name in {"__init__", "__eq__"} - own:
            delattr(cls, name)

    def __eq__(self, other: object) -> bool:
        """Tell whether kind and fields are equal, wherever the configurations were read."""
        if type(self) is not type(other):
            return NotImplemented
        one, two = self.to_dict(), other.to_dict()
        return all(one.get(name) == two.get(name) for name in one.keys() | two.keys() if name not in _ORIGIN)

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """All fields, also by transformers' names, which PEFT and others look for here."""
        fields: dict[str, Any] = super().to_dict()
        if not self.auto_map:
            del fields["auto_map"]
        return fields | {name: fields[own_name] for name, own_name in self.attribute_map.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: every field once, by the library's name."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in self.attribute_map}

    @property
    def transformer_config(self) -> TransformerConfig:
        """The library's own configuration."""
        return TransformerConfig(**{name: getattr(self, name) for name in _OWN})

    @property
    def layer_types(self) -> list[str]:
        """The kind of state that transformers' caches keep for each layer.

        They count steps by the keys of an attention layer; in a model without one the first layer, "hybrid", is given
        keys for that, which take no memory.
        """
        config = self.transformer_config
        attention = "full_attention" if config.attn_window is None else "sliding_attention"
        default = "gate" if config.use_gate_looped_attn else "attention"
        pattern = parse_pattern(default if config.layer_pattern is None else config.layer_pattern, config.depth)
        types = ["linear_attention" if kind == "gate" else attention for kind in pattern]
        return types if attention in types else ["hybrid", *types[1:]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the contents of a config.json, of a run or flat.

        Raises:
            ValueError: as the constructor; or the run's entries are missing or of the wrong type.
        """
        if isinstance(config_dict.get("model"), dict):
            own = {name: value for name, value in config_dict.items() if name not in FOREIGN}
            run = RunConfig.from_json(own, "config.json")
            flat = {"vocab_size": run.tokenizer.size, **dataclasses.asdict(run.model), **IDENTITY}
            config_dict = {name: value for name, value in config_dict.items() if name in FOREIGN} | flat
        # To `from_pretrained` this is the memory of devices.
        devices = {"max_memory": kwargs.pop("max_memory")} if "max_memory" in kwargs else {}
        result = super().from_dict(config_dict, **kwargs)
        return (result[0], {**result[1], **devices}) if kwargs.get("return_unused_kwargs") else result
