"""Runs of `gateloop train` in transformers, and back."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import processes
import pytest
import torch
from kinds import build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from gateloop_transformer import load_model, load_tokenizer
from gateloop_transformer.cli import main
from gateloop_transformer.huggingface import GateLoopForCausalLM, convert, export
from gateloop_transformer.runs.config import RunConfig
from gateloop_transformer.runs.folder import read_config

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
    assert "import gateloop_transformer.huggingface  # makes transformers know the model" in card
    assert "pip install '.[hf]'" in card
    assert json.loads((run / "config.json").read_text())["data_sha256"] in card
    ids = torch.randint(256, (2, 10))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, load_model(run)(ids))
    # Its weights have checksums, as those of the run.
    part = next((tmp_path / "out").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + bytes([part.read_bytes()[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not have the checksum"):
        load_model(tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no run"):
        export(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def bpe_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on short documents, of tokens of BPE."""
    folder = tmp_path_factory.mktemp("bpe")
    rows = [json.dumps({"text": f"the gates {word}."}) for word in ("decide", "remember", "forget") * 100]
    (folder / "text.jsonl").write_text("\n".join(rows))
    data, tokens = str(folder / "text.jsonl"), str(folder / "tokens.json")
    assert main(["tokenizer", "train", data, "--vocab-size", "290", "--out", tokens]) == 0
    sizes = ["--dim", "16", "--depth", "1", "--context", "32", "--batch", "8", "--steps", "40", "--lr", "2e-2"]
    assert main(["train", data, "--tokenizer", tokens, "--out", str(folder / "run"), "--preset", "tiny", *sizes]) == 0
    return folder / "run"


def test_a_generation_ends_with_its_document(bpe_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert AutoConfig.from_pretrained(bpe_run).eos_token_id == load_tokenizer(bpe_run).end
    generator = pipeline("text-generation", model=str(bpe_run))
    found = generator("the gates", max_new_tokens=40, do_sample=False)[0]["generated_text"]
    capsys.readouterr()
    assert main(["generate", str(bpe_run), "--prompt", "the gates", "--tokens", "40", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == found
    assert found.count("the gates") == 1
    # Runs of before it was written down.
    values = json.loads((bpe_run / "config.json").read_text())
    assert values.pop("eos_token_id") == 0
    assert RunConfig.from_json(values, "here") == read_config(bpe_run)


@pytest.mark.parametrize(
    "text",
    [
        *("", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>", " the ", "\n\n\t  x  \n", "\ufeff \u200b\u00a0ﬁ"),
        *("don't I'LL ...", "🙂👩‍👩‍👧 é 日本", "a\0b\r\n", "x" * 3000, "the gates decide " * 500),
    ],
)
def test_transformers_finds_the_same_tokens(bpe_run: Path, text: str, tmp_path: Path) -> None:
    tokenizer, own = AutoTokenizer.from_pretrained(bpe_run), load_tokenizer(bpe_run)
    expected = own.encode(text.encode()).tolist()
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == text
    tokenizer([text, "a"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(bpe_run).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected
    assert load_tokenizer(tmp_path).encode(text.encode()).tolist() == expected


def test_vocabularies_that_were_enlarged(bpe_run: Path, run: Path, tmp_path: Path) -> None:
    for source, name in ((bpe_run, "bpe"), (run, "bytes")):
        model = AutoModelForCausalLM.from_pretrained(source)
        model.resize_token_embeddings(300, mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        load_tokenizer(source).save(tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / "bpe")
    assert tokenizer.decode([299, *tokenizer.encode(b"the"), 295]) == b"the"
    assert tokenizer.lengths.shape == (300,)
    with pytest.raises(ValueError, match="is one of bytes, but the model has 300 tokens"):
        load_tokenizer(tmp_path / "bytes")


def test_a_run_whose_weights_a_tool_wrote_anew_is_converted(bpe_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bpe_run, run)
    save_file(load_file(run / "model.safetensors"), run / "model.safetensors")
    export(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(model.config.vocab_size, (1, 9))
    assert model.generation_config.eos_token_id == 0
    assert torch.equal(model(ids).logits, load_model(run)(ids))
    assert torch.equal(GateLoopForCausalLM.from_pretrained(run)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="has no field 'foo'"):
        convert(run, foo=1)
    (run / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        export(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_pickles_are_never_read(tmp_path: Path) -> None:
    model = build("polar")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_commands_read_shards(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, state = tmp_path / "out", str(tmp_path / "state")
    export(run, out, max_shard_size="2KB")
    greedy = ["--prompt", "the", "--tokens", "5", "--temperature", "0"]
    for command, *options in (["generate", *greedy], ["eval", str(run / "config.json")]):
        found = []
        for folder in (run, out):
            capsys.readouterr()
            assert main([command, str(folder), *options]) == 0
            found.append(capsys.readouterr().out)
        assert found[0] == found[1]
    # A state belongs to the weights, not to the index, which does not change with them.
    assert main(["read", str(out), str(run / "config.json"), "--state", state]) == 0
    assert main(["generate", str(out), "--state", state, "--tokens", "3"]) == 0
    part = next(out.glob("model-00001*"))
    save_file({name: tensor + 1 for name, tensor in load_file(part).items()}, part, {"format": "pt"})
    assert main(["generate", str(out), "--state", state, "--tokens", "3"]) == 2
    part.unlink()
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "a"]) == 2
    assert "is missing" in capsys.readouterr().err
    (out / "model.safetensors.index.json").unlink()
    assert main(["read", str(out), str(run / "config.json"), "--state", state, "--overwrite"]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none"), "--text", "a"]) == 2
    assert "no folder" in capsys.readouterr().err


def test_importing_the_library_imports_no_transformers() -> None:
    processes.python("-c", "import sys, gateloop_transformer.runs.folder; assert 'transformers' not in sys.modules")


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_the_fine_tuning_example(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    if lora:
        pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text("a first document\n\na second one\n\nand a third\n")
    arguments = ["x", "--run", str(run), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "2", *["--lora"] * lora])
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
