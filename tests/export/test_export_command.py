"""`gateloop export`: a run's folder becomes files of other runtimes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from options import ONNX

from gateloop_transformer import load_model
from gateloop_transformer.cli import main
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.export import OnnxGenerator
from gateloop_transformer.runs.config import RunConfig
from gateloop_transformer.runs.folder import publish, write_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, its model untrained."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig(
        TransformerConfig(dim=8, depth=1, use_gate_looped_attn=False, ff_mult=0, heads=2, dim_head=4, rotary_emb=True)
    )
    write_config(folder, config)
    publish(folder, config.model.build().state_dict(), config)
    return folder


def said(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, str, str]:
    code = main([str(word) for word in command])
    return code, *capsys.readouterr()


def steps(errors: str) -> list[str]:
    """What was said to be going on."""
    return [line.removeprefix("gateloop export: ") for line in errors.splitlines() if line.endswith(" ...")]


@ONNX
@pytest.mark.usefixtures("impatient")
def test_onnx_files_of_a_run_give_its_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "onnx"
    command = "export", run, "--format", "onnx", "--out", out, "--block", 3
    code, text, errors = said(capsys, *command, "--json")
    assert code == 0
    assert steps(errors) == [
        *("importing torch ...", "loading the model ...", "importing onnx ..."),
        *("tracing and translating step.onnx ...", "tracing and translating prompt.onnx ..."),
    ]
    result: dict[str, Any] = json.loads(text)
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert result == {
        "out": str(out), "format": "onnx", "tokenizer": "bytes", "block": 3, "files": files
    }  # fmt: skip
    runtime = OnnxGenerator(out, threads=1)
    ids = torch.randint(256, (2, 8))
    expected = load_model(run).generate(ids, 10, temperature=0)
    assert runtime.generate(ids.numpy(), 10).tolist() == expected.tolist()
    assert runtime.tokenizer == "bytes"
    code, text, errors = said(capsys, *command)
    assert (code, text) == (2, "")
    (error,) = (line for line in errors.splitlines() if not line.endswith(" ..."))
    assert "step.onnx' already exists: replace it with --overwrite" in error


@pytest.mark.usefixtures("impatient")
def test_a_program_of_a_run_gives_its_logits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "program"
    command = "export", run, "--format", "torch", "--out", out
    code, text, errors = said(capsys, *command)
    assert code == 0
    assert steps(errors) == ["importing torch ...", "loading the model ...", "tracing the model ..."]
    size = (out / "model.pt2").stat().st_size
    assert text == f"{out / 'model.pt2'}: {size:,} bytes\n"
    ids = torch.randint(256, (3, 5))
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(ids), load_model(run)(ids))
    code, _, errors = said(capsys, *command)
    assert code == 2
    assert "model.pt2' already exists: replace it with --overwrite" in errors
    assert said(capsys, *command, "--overwrite")[0] == 0
    assert [path.name for path in out.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--format", "torch", "--block", 8], "--block is for --format onnx"),
        (["--format", "onnx", "--portable"], "--portable is for --format torch"),
        (["--format", "onnx", "--block", 1], "block must be at least 2 tokens, not 1"),
        (["--format", "onnx", "--checkpoint", "best"], "checkpoint"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_go_together_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[object], problem: str
) -> None:
    code, text, errors = said(capsys, "export", run, "--out", run / "new", *flags)
    assert (code, text) == (2, "")
    assert problem in errors
    assert len(errors.splitlines()) == 1
    assert not (run / "new").exists()


def test_a_missing_package_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, errors = said(capsys, "export", run, "--format", "onnx", "--out", run / "new")
    assert code == 2
    assert errors == "gateloop export: error: onnx is not installed; `pip install gateloop-transformer[export]`\n"


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=ONNX)])
def test_a_folder_that_cannot_be_made_is_one_line_before_the_work(
    run: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    out = run / "config.json" / "below"
    code, _, errors = said(capsys, "export", run, "--format", format, "--out", out)
    assert (code, errors) == (2, f"gateloop export: error: cannot make the folder '{out}': Not a directory\n")
