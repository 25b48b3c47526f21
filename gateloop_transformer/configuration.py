"""The arguments of `Transformer` as data: what the command line's flags and the files of runs are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateloop_transformer.model import Transformer


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, common: bool = False) -> Any:
    """A dataclass field with the text that the command line shows for it.

    `common`: one of the few that most users set: --help shows it, the others are shown by --help-all.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "common": common})


# What did best of all that was tried (docs/results/language.md): mixers alone, whose convolved queries, keys and values
# start as a gated sum, with memories from one step on; and `recipe_rank`.
RECIPE: dict[str, Any] = {"gate": "ring", "ff_mult": 0, "conv_size": 4, "conv_silu": True, "qkv_bias": True}


def recipe_rank(dim: int, changes: Mapping[str, Any] = MappingProxyType({})) -> int | None:
    """How many numbers of each input the recipe's gates depend on; None: all of them.

    Where the model is narrow, or `changes` say that its gates are few or the same for all data, there is nothing to be
    saved.
    """
    if dim < 48 or changes.get("gate_loop_heads") or changes.get("fixed_gates"):
        return None
    return max(16, dim // 16)


@dataclass(frozen=True)
class TransformerConfig:
    """The arguments of `Transformer`, in its words; the vocabulary is the tokenizer's."""

    dim: int = option(128, "width", common=True)
    depth: int = option(4, "number of blocks", common=True)
    dim_head: int = option(64, "size of an attention head")
    heads: int = option(8, "number of attention heads")
    ff_mult: int = option(4, "inner width of the feed-forward, as a multiple of the width; 0: none")
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
    gate: str = option("polar", "kind of gate", ("polar", "paper", "ring"), common=True)
    head_norm: bool = option(False, "RMS norm on the output of each gate loop head")
    qk_norm: bool = option(False, "RMS norm on queries and keys")
    conv_size: int = option(0, "taps of the causal convolution in gate loop layers; 0: none")
    conv_silu: bool = option(False, "SiLU after that convolution, which then starts at random")
    qkv_bias: bool = option(False, "biases in gate loop layers that start at 1 for queries and keys")
    max_memory: float = option(
        1024, "longest memory that gates with a spread start begin with, in steps; a preset's grows with the context"
    )
    min_memory: float = option(1.0, "shortest memory that gates with a spread start begin with, in steps")
    phase_spread: float = option(
        0.0, "standard deviation of what the data first adds to the phases of a spread start, in radians"
    )
    spread_start: bool | None = option(None, "gates begin with memories spread up to --max-memory; none: ring gates do")
    gate_rank: int | None = option(
        None, "numbers of each input that the gates of gate loop layers depend on; none: all of it"
    )
    fixed_gates: bool = option(False, "ring gates that do not depend on the data, as in an LRU")
    attn_window: int | None = option(None, "steps that attention layers see at most; none: all")
    dropout: float = option(0.0, "probability of dropping an element of what a block adds")

    def mixers(self) -> list[str]:
        """The kinds of its layers' time mixers in turn, "gate" or "attention", to be repeated up to the depth."""
        return (self.layer_pattern or ("gate" if self.use_gate_looped_attn else "attention")).split()

    def arguments(self, num_tokens: int = 256) -> dict[str, Any]:
        """Keyword arguments for `Transformer`, of a vocabulary of that size.

        Raises:
            ValueError: data_dependent_rel_pos is none of the words for it.
        """
        position, words = self.data_dependent_rel_pos, {"none": False, "released": True, "gate_loop": "gate_loop"}
        if position not in words:
            raise ValueError(f"data_dependent_rel_pos must be one of {', '.join(words)}, not {position!r}")
        return {
            "num_tokens": num_tokens,
            **dataclasses.asdict(self),
            "data_dependent_rel_pos": words[position],
        }

    @classmethod
    def recommended(cls, dim: int = 512, depth: int = 6, *, context: int = 1024, **changes: Any) -> TransformerConfig:
        """The recipe for new models; `TransformerConfig()` are the defaults of the original.

        Args:
            dim: width.
            depth: number of blocks.
            context: tokens that the model is trained on at a time, at least 1; the longest memories start at a quarter
                of it, or at 2 tokens.
            changes: other fields.

        Raises:
            TypeError: there is no such field.
            ValueError: context is no number of at least 1.

        >>> TransformerConfig.recommended(128, 4).gate
        'ring'
        """
        if not isinstance(context, Real) or isinstance(context, bool) or not 1 <= context < math.inf:
            raise ValueError(f"TransformerConfig: context must be at least 1 token, not {context!r}")
        recipe = {**RECIPE, "dim": dim, "depth": depth, "max_memory": max(context / 4, 2.0)}
        recipe["gate_rank"] = recipe_rank(dim, changes)
        return cls(**{**recipe, **changes})

    def build(self, num_tokens: int = 256) -> Transformer:
        """A new model of a vocabulary of that size.

        Raises:
            ValueError: as `Transformer`.
        """
        from gateloop_transformer.model import Transformer

        return Transformer(**self.arguments(num_tokens))
