"""Runs of `gateloop train` in transformers, and back."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gateloop_transformer import load_model, load_tokenizer
from gateloop_transformer.cli import main
from gateloop_transformer.huggingface import GateLoopForCausalLM, export

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("the gates decide how long to remember, and the phases what for.\n" * 200)
    sizes = ["--dim", "16", "--depth", "2", "--context", "32", "--batch", "4", "--steps", "30", "--lr", "1e-2"]
    assert main(["train", str(folder / "text.txt"), "--out", str(folder / "run"), "--preset", "tiny", *sizes]) == 0
    return folder / "run"


def test_a_run_is_a_pretrained_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert isinstance(model, GateLoopForCausalLM)
    assert AutoConfig.from_pretrained(run).dim == 16
    found = model.generate(**tokenizer("the gates", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert main(["generate", str(run), "--prompt", "the gates", "--tokens", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(found[0])


def test_what_transformers_saves_is_read_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own, weights = load_model(tmp_path), load_model(run).state_dict()
    assert own.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in own.state_dict().items())
    assert load_tokenizer(tmp_path).kind == "bytes"
    assert main(["train", "--out", str(tmp_path), "--resume"]) == 2
    assert "describes a model alone" in capsys.readouterr().err


def test_an_exported_run(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", max_shard_size="2KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "README.md", "loss.png", "tokenizer.json", "model.safetensors.index.json"} <= names
    card = (tmp_path / "out" / "README.md").read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "bits_per_byte" in record][-1]
    assert f"{last['bits_per_byte']:.4f} bits per byte after 30 steps" in card
    assert "text.txt" in card
    assert json.loads((run / "config.json").read_text())["data_sha256"] in card
    ids = torch.randint(256, (2, 10))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, load_model(run)(ids))
    with pytest.raises(ValueError, match="not empty"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no run"):
        export(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_importing_the_library_imports_no_transformers() -> None:
    code = "import sys, gateloop_transformer.training.folder; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_the_fine_tuning_example(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    if lora:
        pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text("a first document\n\na second one\n\nand a third\n")
    arguments = ["x", str(run), str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments + ["--lora"] * lora)
    with warnings.catch_warnings():
        # peft asks for what transformers deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        runpy.run_path(str(EXAMPLES / "finetune_with_trainer.py"), run_name="__main__")
    changed, weights = load_model(tmp_path / "out").state_dict(), load_model(run).state_dict()
    assert changed.keys() == weights.keys()
    name = "layers.0.0.fn.to_qkv.weight"
    assert lora or not torch.equal(changed[name], weights[name])
    assert load_tokenizer(tmp_path / "out").kind == "bytes"


def test_the_conversation_example(run: Path) -> None:
    answer = runpy.run_path(str(EXAMPLES / "talk_in_a_pipeline.py"))["talker"](str(run), tokens=8)
    turns = [answer("the gates"), answer("decide")]
    said = b""
    for text, found in zip(["the gates\n", "decide\n"], turns, strict=True):
        said += text.encode()
        ids = torch.tensor([list(said)])
        whole = bytes(load_model(run).generate(ids, 8, temperature=0)[0].tolist())
        assert whole[len(said) :].decode(errors="replace") == found
        said = whole
