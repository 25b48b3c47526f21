"""The modules that PEFT adapts in these models unless it is told otherwise."""

from __future__ import annotations

import contextlib

from gateloop_transformer.huggingface.configuration import GateLoopConfig

# Attention has the Linear layers of to_qkv and to_out one level deeper, as the original has.
PROJECTIONS = ("to_qkv", "to_qkv.0", "to_a.0", "to_gates.0", "to_out", "to_out.1")
# IA³ scales keys and values, and what goes into the second matrix of a feed-forward.
SCALED, SCALED_INPUTS = ("to_qkv", "to_qkv.0", "fn.2"), ("fn.2",)
NORMS = ("norm", "to_logits.0")


def tell_peft() -> None:
    """Give every method of PEFT that adapts layers its targets in a GateLoop model; where there is no PEFT, nothing."""
    with contextlib.suppress(ImportError):
        from peft.utils import constants

        kind, own = str(GateLoopConfig.model_type), {"IA3": SCALED, "LNTUNING": NORMS}
        for name, targets in vars(constants).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
                targets[kind] = list(own.get(name.split("_")[3], PROJECTIONS))
        constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind] = list(SCALED_INPUTS)
