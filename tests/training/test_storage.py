"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from gateloop_transformer.training.storage import read_tensors, write_tensors


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "ä": torch.ones(2, 2, dtype=torch.bfloat16), "a": torch.zeros(0)}
    metadata = {"format": "pt", "model": '{"é": "\\n\\u007f/\t\x01"}', "other": "x", "": "\N{GRINNING FACE}"}
    for n in range(8):
        write_tensors(tmp_path / f"{n}.safetensors", tensors, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    found, said = read_tensors(tmp_path / "0.safetensors")
    assert said == metadata
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
