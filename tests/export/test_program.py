"""A model as a program of torch.export: any batch and length, saved, loaded, with the library and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from cases import needs
from options import VOCABULARY, config, shaken
from torch import Tensor

from gateloop_transformer import GateLoopedAttention, Transformer, quantize
from gateloop_transformer.export import export_onnx, export_program

PORTABLE = needs("torch", "2.11", "portable programs are refused before")
SHAPES = [(1, 1), (2, 1), (1, 7), (3, 64), (2, 150)]

LOAD = """
import sys
sys.modules["gateloop_transformer"] = None
import torch
def check(name):
    run = torch.export.load(name + ".pt2").module()
    for ids, logits in torch.load(name + ".pt"):
        torch.testing.assert_close(run(ids), logits, rtol=0, atol=1e-10)
check("portable")
del sys.modules["gateloop_transformer"]
import gateloop_transformer.model
check("native")
"""


def make(**options: Any) -> Transformer:
    return shaken(Transformer(12, num_tokens=VOCABULARY, heads=2, dim_head=4, **options)).double()


def windowed(**options: Any) -> Transformer:
    """With a layer of attention to a window."""
    return make(depth=2, layer_pattern="gate attention", rotary_emb=True, attn_window=4, **options)


def inputs() -> list[Tensor]:
    return [torch.randint(VOCABULARY, shape) for shape in SHAPES]


@pytest.mark.slow
@PORTABLE
def test_programs_give_the_logits_of_the_model_in_another_process(tmp_path: Path) -> None:
    model = make(depth=1, gate="ring", gate_loop_heads=2, head_norm=True, conv_size=3, dropout=0.5)
    for name in ("native", "portable"):
        model.train()
        program = export_program(model, portable=name == "portable", max_length=150)
        assert all(module.training for module in model.modules())
        torch.export.save(program, tmp_path / f"{name}.pt2")
        model.eval()
        torch.save([(ids, model(ids).detach()) for ids in inputs()], tmp_path / f"{name}.pt")
    processes.python("-c", LOAD, cwd=tmp_path)


@PORTABLE
def test_a_portable_program_reads_any_length() -> None:
    model = windowed()
    program = export_program(model, portable=True, max_length=150)
    assert not [node for node in program.graph.nodes if "gateloop" in str(node.target)]
    run = program.module()
    for ids in inputs():
        torch.testing.assert_close(run(ids), model(ids), rtol=0, atol=1e-10)
    with pytest.raises(AssertionError, match="150"):
        run(torch.zeros(1, 151, dtype=torch.int64))


def test_what_the_lowest_torch_cannot_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    model = config("polar").build()
    with pytest.raises(ValueError, match=r"a portable program needs torch 2\.11 or newer, not 2\.6\.0\+cpu"):
        export_program(model, portable=True)
    with pytest.raises(ValueError, match=r"export_onnx needs torch 2\.7 or newer, not 2\.6\.0\+cpu"):
        export_onnx(model, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a Transformer, not GateLoopedAttention"):
        export_program(GateLoopedAttention(8))  # type: ignore[arg-type]
    model = config("polar").build()
    with pytest.raises(ValueError, match="the model is quantized"):
        export_program(quantize(model, "int8"))
    with pytest.raises(ValueError, match="max_length must be at least 2 steps, not 1"):
        export_program(model, portable=True, max_length=1)
