"""Record whole models and layers as users of the original package have them: pickled by `torch.save(model, FILE)`.

Writes OUT/*.pt.gz; `tests/training/test_pickles.py` loads and converts them. Each holds a module under "model", with
its input and output, and with the gradient of the input where it has one. Run it in an environment of its own, as
record_parity.py says:

    original/bin/python record_pickles.py OUT
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gateloop_transformer import SimpleGateLoopLayer, Transformer

SIZES = {"num_tokens": 9, "depth": 1, "ff_mult": 1}
GATES = {"gate_loop_heads": 2, "sub_ln": True, "frac_gradient_state_transition": 0.5, "ablate_complex": True}
ATTENTION = {"use_gate_looped_attn": False, "heads": 3, "dim_head": 4, "rotary_emb": True, "post_ln_norm": True}
MODULES = {
    "gates": lambda: Transformer(4, **SIZES, **GATES),
    "attention": lambda: Transformer(4, **SIZES, **ATTENTION, attn_softmax_normalize=False),
    "position": lambda: Transformer(
        4, **SIZES, **ATTENTION | {"rotary_emb": False}, data_dependent_rel_pos=True, attn_add_swish_gating=False
    ),
    "simple": lambda: SimpleGateLoopLayer(4, post_ln=True, reverse=True, use_heinsen=True),
}


def content(module: nn.Module) -> dict[str, Any]:
    """A module, and what it computes."""
    if isinstance(module, Transformer):
        ids = torch.randint(9, (2, 7))
        return {"model": module, "input": ids, "output": module(ids).detach()}
    x = torch.randn(2, 7, 4, requires_grad=True)
    y = module(x)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x)
    return {"model": module, "input": x.detach(), "output": y.detach(), "gradient": grad}


def main() -> None:
    """Build, run and save."""
    parser = argparse.ArgumentParser(description="Record pickles of the original.")
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, build in MODULES.items():
        torch.manual_seed(5)
        module, file = build().eval(), io.BytesIO()
        if name == "attention":
            # Frequencies are a parameter: others than at the start show that they are kept.
            module.layers[0][0].fn.rotary_emb.freqs.data *= 1.5
        torch.save(content(module), file)
        # A rotary embedding keeps a table of many zeros.
        (out / f"{name}.pt.gz").write_bytes(gzip.compress(file.getvalue(), 9, mtime=0))


if __name__ == "__main__":
    main()
