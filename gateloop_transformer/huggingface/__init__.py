"""GateLoop in Hugging Face transformers: importing this package makes its Auto classes know the models.

>>> import gateloop_transformer.huggingface
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("runs/mine")  # doctest: +SKIP
"""

from __future__ import annotations

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "gateloop_transformer.huggingface needs transformers 5.15 or newer: pip install gateloop-transformer[hf]"
    ) from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 15):
    raise ImportError(
        f"gateloop_transformer.huggingface needs transformers 5.15 or newer, not {transformers.__version__}: "
        "pip install gateloop-transformer[hf]"
    )

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gateloop_transformer.huggingface.card import convert, export, model_card
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
# Where Trainer looks whether smoothed labels are to be shifted.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GateLoopConfig.model_type] = GateLoopForCausalLM.__name__

__all__ = [
    "GateLoopConfig",
    "GateLoopForCausalLM",
    "GateLoopForSequenceClassification",
    "GateLoopModel",
    "GateLoopPreTrainedModel",
    "convert",
    "export",
    "model_card",
]
