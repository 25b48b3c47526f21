"""The arguments of `Transformer` as data, from which the command line's flags and the files of runs are made."""

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

    `common`: --help shows the field; the others are shown only by --help-all.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "common": common})


# The best of all settings that were tried (docs/results/language.md): mixers alone, whose convolved queries, keys and
# values start as a gated sum, with memories from one step on. `recipe_rank` completes it.
RECIPE: dict[str, Any] = {"gate": "ring", "ff_mult": 0, "conv_size": 4, "conv_silu": True, "qkv_bias": True}


def recipe_rank(dim: int, changes: Mapping[str, Any] = MappingProxyType({})) -> int | None:
    """The rank of the recipe's gate projections; None: full rank.

    A low rank saves nothing where the model is narrow, or where `changes` make its gates few or independent of the
    data.
    """
    if dim < 48 or changes.get("gate_loop_heads") or changes.get("fixed_gates"):
        return None
    return max(16, dim // 16)


@dataclass(frozen=True)
class TransformerConfig:
    """The arguments of `Transformer` under the same names, without num_tokens, which the tokenizer decides."""

    dim: int = option(128, "width", common=True)
    depth: int = option(4, "number of blocks", common=True)
    dim_head: int = option(64, "size of an attention head")
    heads: int = option(8, "number of attention heads")
    ff_mult: int = option(4, "inner width of the feed-forward, as a multiple of the width; 0: none")
    use_gate_looped_attn: bool = option(True, "gate loop layers rather than attention layers")
    gate_loop_heads: int | None = option(None, "heads of a gate loop layer; none: as many as its width")
    attn_add_swish_gating: bool = option(True, "SiLU gate on the output of each time mixer")
    dim_gate_looped_attn: int | None = option(None, "inner width of the gate loop layers; none: the width")
    attn_softmax_normalize: bool | None = option(
        None, "softmax in attention; none: softmax unless --data-dependent-rel-pos is set"
    )
    data_dependent_rel_pos: str = option(
        "none", "relative positions in attention layers", ("none", "released", "gate_loop")
    )
    frac_gradient_state_transition: float = option(0.9, "factor on the gradient into the gate projections")
    ablate_complex: bool = option(False, "real gates only")
    ablate_state_transition: bool = option(False, "set all gates to 1")
    rotary_emb: bool = option(False, "rotary position embedding in attention layers")
    post_ln_norm: bool = option(False, "LayerNorm after each residual instead of RMSNorm before each layer")
    sub_ln: bool = option(False, "LayerNorm on the merged heads")
    layer_pattern: str | None = option(None, "mixers in turn, such as 'gate gate attention'; none: all of one kind")
    gate: str = option("polar", "kind of gate", ("polar", "paper", "ring"), common=True)
    head_norm: bool = option(False, "RMS norm on the output of each gate loop head")
    qk_norm: bool = option(False, "RMS norm on queries and keys")
    conv_size: int = option(0, "taps of the causal convolution in gate loop layers; 0: none")
    conv_silu: bool = option(False, "SiLU after that convolution, whose weights then start at random")
    qkv_bias: bool = option(False, "biases in gate loop layers that start at 1 for queries and keys")
    max_memory: float = option(
        1024, "longest memory that gates with a spread start begin with, in steps; a preset's grows with the context"
    )
    min_memory: float = option(1.0, "shortest memory that gates with a spread start begin with, in steps")
    phase_spread: float = option(
        0.0, "standard deviation of what the data first adds to the phases of a spread start, in radians"
    )
    spread_start: bool | None = option(
        None, "gates begin with memories spread up to --max-memory; none: only ring gates do"
    )
    gate_rank: int | None = option(None, "rank of the gate projection in gate loop layers; none: full rank")
    fixed_gates: bool = option(False, "ring gates that do not depend on the data, as in an LRU")
    attn_window: int | None = option(None, "most steps that attention layers see; none: all")
    dropout: float = option(0.0, "probability of dropping an element of what a layer adds")

    def mixers(self) -> list[str]:
        """The kinds of time mixers in turn, "gate" or "attention", to be repeated up to the depth."""
        return (self.layer_pattern or ("gate" if self.use_gate_looped_attn else "attention")).split()

    def arguments(self, num_tokens: int = 256) -> dict[str, Any]:
        """Keyword arguments for a `Transformer` with a vocabulary of that size.

        Raises:
            ValueError: data_dependent_rel_pos has an unknown value.
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
        """The recipe for new models; `TransformerConfig()` has the defaults of the original.

        Args:
            dim: width.
            depth: number of blocks.
            context: tokens that the model is trained on at a time, at least 1; the longest memories start at a quarter
                of it, or at 2 tokens.
            changes: values for other fields.

        Raises:
            TypeError: there is no such field.
            ValueError: context is not a number of at least 1.

        >>> TransformerConfig.recommended(128, 4).gate
        'ring'
        """
        if not isinstance(context, Real) or isinstance(context, bool) or not 1 <= context < math.inf:
            raise ValueError(f"TransformerConfig: context must be at least 1 token, not {context!r}")
        recipe = {**RECIPE, "dim": dim, "depth": depth, "max_memory": max(context / 4, 2.0)}
        recipe["gate_rank"] = recipe_rank(dim, changes)
        return cls(**{**recipe, **changes})

    def build(self, num_tokens: int = 256) -> Transformer:
        """Build a new model with a vocabulary of that size.

        Raises:
            ValueError: an option is out of range or unknown, as in `Transformer`.
        """
        from gateloop_transformer.model import Transformer

        return Transformer(**self.arguments(num_tokens))
