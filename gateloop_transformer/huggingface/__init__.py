"""GateLoop in Hugging Face transformers: importing this package makes its Auto classes know the models.

>>> import gateloop_transformer.huggingface
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("runs/mine")  # doctest: +SKIP
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from gateloop_transformer.huggingface.configuration import GateLoopConfig
from gateloop_transformer.huggingface.modeling import (
    GateLoopForCausalLM,
    GateLoopForSequenceClassification,
    GateLoopModel,
    GateLoopPreTrainedModel,
)

AutoConfig.register(GateLoopConfig.model_type, GateLoopConfig, exist_ok=True)
AutoModel.register(GateLoopConfig, GateLoopModel, exist_ok=True)
AutoModelForCausalLM.register(GateLoopConfig, GateLoopForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GateLoopConfig, GateLoopForSequenceClassification, exist_ok=True)
# Files have the library's names.
register_checkpoint_conversion_mapping(
    GateLoopConfig.model_type,
    [
        WeightRenaming(r"^token_emb\.", "model.token_emb."),
        WeightRenaming(r"^layers\.", "model.layers."),
        WeightRenaming(r"^to_logits\.0\.", "model.norm."),
        WeightRenaming(r"^to_logits\.weight", "lm_head.weight"),
        WeightRenaming(r"^to_logits\.1\.", "lm_head."),
    ],
    overwrite=True,
)

__all__ = [
    "GateLoopConfig",
    "GateLoopForCausalLM",
    "GateLoopForSequenceClassification",
    "GateLoopModel",
    "GateLoopPreTrainedModel",
]
