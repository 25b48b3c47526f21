"""GateLoop models for transformers: the library's own modules behind transformers' interface."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from gateloop_transformer.huggingface.cache import CACHE_NAME, check_cache, load, store
from gateloop_transformer.huggingface.configuration import GateLoopConfig
from gateloop_transformer.huggingface.steps import Marks, Steps, read_marks
from gateloop_transformer.model import Transformer


class GateLoopPreTrainedModel(PreTrainedModel):
    """What all GateLoop models share: the library's modules by the library's names, and how they run."""

    config_class = GateLoopConfig
    base_model_prefix = "model"
    token_emb: nn.Embedding
    layers: nn.ModuleList
    to_logits: nn.Module
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["PreNorm", "PostNorm"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(self, config: GateLoopConfig, of: Transformer | GateLoopPreTrainedModel | None = None) -> None:
        super().__init__(config)
        if of is None:
            # All in one precision, that which transformers has set.
            of = config.transformer_config.build(config.vocab_size).to(torch.get_default_dtype())
            # A flag of the layers, for a model and its backbone have them in common.
            of.layers.gradient_checkpointing = False  # type: ignore[assignment]
        self.share(of)

    def share(self, other: Transformer | GateLoopPreTrainedModel) -> None:
        """Be made of the modules of another model: of the library, or of this package."""
        self.token_emb, self.layers, self.to_logits = other.token_emb, other.layers, self.keep(other.to_logits)

    @staticmethod
    def keep(to_logits: nn.Module) -> nn.Module:
        """Keep the part of the library's `to_logits` that this model has: the norm before the last matrix, if any."""
        return to_logits[:1] if isinstance(to_logits, nn.Sequential) else nn.Identity()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, but only from safetensors.

        Raises:
            ValueError: use_safetensors is False: files of another kind are pickles, which can run any code.
        """
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError(f"{cls.__name__}: weights are read only from safetensors: use_safetensors must be True")
        kwargs["use_safetensors"] = True
        return super().from_pretrained(*args, **kwargs)

    def finish(self) -> None:
        """End a constructor: the weights that it has made need no further initialisation."""
        for parameter in self.parameters():
            if parameter.device.type != "meta":
                parameter._is_hf_initialized = True
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights that no file gave: like a new library model, or as a new matrix for classes."""
        name = next((name for name, each in super().named_modules() if each is module), None)
        if name == "":
            return
        if name is None or name == "score":
            # A matrix for classes, or one that is to take the place of another.
            fresh: Any = copy.deepcopy(module)
            fresh.reset_parameters()
        else:
            fresh = self._fresh().get_submodule(name)
        for name, parameter in fresh.named_parameters(recurse=False):
            # Passes over those that are loaded.
            init.copy_(module.get_parameter(name), parameter)

    def _fresh(self) -> Transformer:
        """A new library model; kept until all weights are there."""
        if "_new" not in self.__dict__:
            self.__dict__["_new"] = self.config.transformer_config.build(self.config.vocab_size)
        return cast(Transformer, self.__dict__["_new"])

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.__dict__.pop("_new", None)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Return the mask as it is, which is how every layer takes it."""
        return attention_mask

    def get_input_embeddings(self) -> Any:
        return self.token_emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_emb = cast(nn.Embedding, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List all modules except those in a projection's place that are none: containers and empty ones.

        PEFT is told what to adapt by the ends of names, and to_qkv and to_out are Linear layers of gate loops, but
        around those of attention, whose Linear layers are to_qkv.0 and to_out.1.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not (name.endswith((".to_qkv", ".to_out")) and type(module) in (nn.Sequential, nn.Identity)):
                yield name, module

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Tell whether blocks are recomputed in the backward pass; PEFT still uses this name."""
        return bool(getattr(self.layers, "gradient_checkpointing", False))

    def run(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of all steps after the last norm.

        Args:
            input_ids: (B, T) tokens; or
            inputs_embeds: (B, T, dim) in their place.
            attention_mask: (B, L) with L ≥ T, for all steps so far, 0 for padding on whatever side: padded steps change
                no state, and their hidden states are 0.
            position_ids: (B, T). Where they do not increase by 1 and there is no mask, documents are packed in a row,
                and each begins from an empty state. Positions have no other effect.
            past_key_values: `DynamicCache(config=model.config)` as the call before left it.
            use_cache: return the cache; None: as configured, but not in training.
            output_hidden_states: return the input of each block, and the last output; None: as configured.
            cu_seq_lens_q: (N + 1,) bounds of the documents packed in a batch of one row.
            seq_idx: (B, T) the number of each step's document, where there is neither a mask nor bounds.
            cache: past_key_values by the name that it has from transformers 5.24 on.
            kwargs: ignored.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, past_key_values and a cache, or a shape or a
                cache that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}: give either input_ids or inputs_embeds")
        if cache is not None and past_key_values is not None:
            raise ValueError(f"{type(self).__name__}: cache is another name of past_key_values: give one of them")
        cache = past_key_values if cache is None else cache
        x = self.token_emb(self._masked_ids(input_ids, attention_mask)) if input_ids is not None else inputs_embeds
        x = cast(Tensor, x)
        training = self.layers.training
        use_cache = (self.config.use_cache and not training) if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and training and self.is_gradient_checkpointing:
            use_cache = False
        if use_cache and torch.onnx.is_in_onnx_export():
            raise ValueError(
                f"{type(self).__name__}: torch.onnx.export cannot write a cache: save the model and write it with its "
                "state by `gateloop export FOLDER --format onnx --out OUT` (docs/export.md), or set "
                "model.config.use_cache = False for logits alone"
            )
        if cache is not None:
            check_cache(cache, [cast(nn.Module, mixer.fn) for mixer, _ in cast(Any, self.layers)])
        elif use_cache:
            cache = DynamicCache(config=self.config)
        marks = Marks(attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        steps = read_marks(type(self).__name__, x, marks, cached=cache is not None)
        length = x.shape[1]
        x = x if steps.padding is None else steps.padding.pack(x)
        hidden: list[Tensor] = []
        for n, block in enumerate(self.layers):
            if output_hidden_states:
                hidden.append(x)
            x = self._block(n, block, x, cache, steps, length)
        x = self.to_logits[0](x) if isinstance(self.to_logits, nn.Sequential) else x
        hidden.append(x)
        if steps.padding is not None:
            hidden = [steps.padding.unpack(each) for each in hidden]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            hidden_states=tuple(hidden) if output_hidden_states else None,
            **{CACHE_NAME: cache if use_cache else None},
        )

    def _masked_ids(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Check that ids are in the vocabulary, except those of padding, and make these valid.

        Raises:
            ValueError: one is not.
        """
        if mask is not None and mask.ndim == 2 and mask.shape[1] >= ids.shape[1] > 0:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, 0)
        if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
            size = self.token_emb.weight.shape[0]
            if int(ids.min()) < 0 or int(ids.max()) >= size:
                raise ValueError(
                    f"{type(self).__name__}: input_ids must be in [0, {size}), got {int(ids.min())} to {int(ids.max())}"
                )
        return ids

    def _block(self, n: int, block: nn.Module, x: Tensor, cache: Cache | None, steps: Steps, length: int) -> Tensor:
        mixer, feedforward = cast(nn.ModuleList, block)
        flags = {
            "ablate_complex": self.config.ablate_complex,
            "ablate_state_transition": self.config.ablate_state_transition,
            **steps.layout,
        }
        if cache is not None:
            state = load(cache, n, cast(nn.Module, mixer.fn), steps.seen)
            x, state = mixer(x, state=state, return_state=True, **flags)
            store(cache, n, state, length, steps.padding is not None)
            return cast(Tensor, feedforward(x))
        if self.is_gradient_checkpointing and self.layers.training:
            recompute: Any = self.layers._gradient_checkpointing_func
            return cast(Tensor, recompute(_run, mixer, feedforward, x, flags))
        return _run(mixer, feedforward, x, flags)


def _run(mixer: nn.Module, feedforward: nn.Module, x: Tensor, flags: dict[str, Any]) -> Tensor:
    return cast(Tensor, feedforward(mixer(x, **flags)))


class GateLoopModel(GateLoopPreTrainedModel):
    """The Transformer without its last matrix: ids to hidden states."""

    def __init__(self, config: GateLoopConfig, of: Transformer | GateLoopPreTrainedModel | None = None) -> None:
        super().__init__(config, of)
        self.finish()

    # With its own signature: there are tools that look what a model takes.
    forward = can_return_tuple(GateLoopPreTrainedModel.run)


class GateLoopModelWithHead(GateLoopPreTrainedModel):
    """What models with something on top of the hidden states share: their backbone."""

    def finish(self) -> None:
        # No child: its modules are this model's own, which have the library's names here.
        self.__dict__["_backbone"] = GateLoopModel(self.config, self)
        super().finish()

    @property
    def model(self) -> GateLoopModel:
        """The backbone, also `base_model`: ids to hidden states by the modules of this model, heads left out."""
        backbone = cast(GateLoopModel, self.__dict__["_backbone"])
        # An adapter or a wrapper may have taken a module's place.
        backbone.share(self)
        return backbone


class GateLoopForCausalLM(GateLoopModelWithHead, GenerationMixin):
    """A language model: the whole Transformer of the library."""

    def __init__(self, config: GateLoopConfig) -> None:
        super().__init__(config)
        self.finish()

    @staticmethod
    def keep(to_logits: nn.Module) -> nn.Module:
        return to_logits

    def get_output_embeddings(self) -> nn.Module:
        return self.to_logits[1] if isinstance(self.to_logits, nn.Sequential) else self.to_logits

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if isinstance(self.to_logits, nn.Sequential):
            self.to_logits[1] = new_embeddings
        else:
            self.to_logits = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every step; arguments are those of `run`, and

        Args:
            labels: (B, T) the tokens again, -100 where nothing is to be predicted; they are shifted here.
            logits_to_keep: a number of steps from the end, or the steps to keep; 0: all.

        Raises:
            ValueError: as `run`.
        """
        output = self.run(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE_NAME: getattr(output, CACHE_NAME)},
        )


class GateLoopForSequenceClassification(GateLoopModelWithHead):
    """GateLoopModel and a matrix on the hidden state of the last token that is not padding."""

    def __init__(self, config: GateLoopConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.dim, config.num_labels, bias=False)
        self.finish()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels); arguments are those of `run`, and

        Args:
            labels: (B,) classes, (B,) numbers or (B, num_labels), as config.problem_type says.

        Raises:
            ValueError: as `run`; or where padding is cannot be told.
        """
        output = self.run(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden = output.last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        logits = self.score(hidden[rows, self._last(hidden, input_ids, attention_mask)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE_NAME: getattr(output, CACHE_NAME)},
        )

    def _last(self, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """(B,) the place of each row's last token."""
        B, T = hidden.shape[:2]
        pad = self.config.pad_token_id
        if mask is not None:
            there = mask[:, -T:] != 0
        elif ids is not None and pad is not None:
            there = ids != pad
        elif B == 1:
            there = torch.ones(B, T, dtype=torch.bool, device=hidden.device)
        else:
            raise ValueError(
                "GateLoopForSequenceClassification: a batch needs an attention_mask, or a config.pad_token_id to tell "
                "padding by"
            )
        return (there * torch.arange(1, T + 1, device=hidden.device)).argmax(1)


__all__ = [
    "GateLoopForCausalLM",
    "GateLoopForSequenceClassification",
    "GateLoopModel",
    "GateLoopPreTrainedModel",
]
