"""Record a checkpoint as users of the original package have them: compiled, under DDP, saved with its optimizer.

Writes OUT/attention_ddp.pt, which `tests/conversion/test_conversion.py` converts; its entry "recorded" holds ids and
the original's logits for them. Run it in an environment of its own, as record_parity.py says:

    original/bin/python record_checkpoint.py OUT
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from gateloop_transformer import Transformer

ARGUMENTS = {"use_gate_looped_attn": False, "heads": 2, "dim_head": 4, "ff_mult": 1}


def main() -> None:
    """Train for a step, and save."""
    parser = argparse.ArgumentParser(description="Record a checkpoint of the original.")
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    torch.manual_seed(7)
    wrapped = DistributedDataParallel(
        torch.compile(Transformer(8, num_tokens=17, depth=1, **ARGUMENTS), backend="eager")
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    ids = torch.randint(17, (2, 19))
    wrapped(ids, return_loss=True).backward()
    optimizer.step()
    with torch.no_grad():
        recorded = {"ids": ids, "logits": wrapped(ids).clone()}
    content = {"model": wrapped.state_dict(), "optimizer": optimizer.state_dict(), "step": 1, "recorded": recorded}
    out.mkdir(parents=True, exist_ok=True)
    torch.save(content, out / "attention_ddp.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
