"""Runs on BPE tokens and on records, from the command line: what is said is of bytes, and nothing else differs."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import give, lines

from gateloop_transformer import Transformer
from gateloop_transformer.cli import main
from gateloop_transformer.cli.generate import _write
from gateloop_transformer.data.bpe import load_tokenizer_file
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.evaluation.bits import score, validate
from gateloop_transformer.evaluation.reading import read
from gateloop_transformer.runs.folder import load_model, load_tokenizer, read_config

TEXTS = [f"{n} times {n} is {n * n}, ünd so.\nAnd {n + 1} is next “here”.\n" for n in range(300)]
TEXT = "".join(TEXTS).encode()
TINY = [
    *("--dim", "16", "--depth", "2", "--gate-loop-heads", "4", "--context", "16", "--batch", "4", "--steps", "4"),
    *("--eval-bytes", "256", "--sample-bytes", "8", "--eval-every", "2", "--checkpoint-every", "2"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records, a tokenizer, and a run on both."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "data.jsonl").write_bytes(lines(TEXTS, "body"))
    data = [str(folder / "data.jsonl"), "--field", "body"]
    made = ["tokenizer", "train", *data, "--vocab-size", "320", "--out", str(folder / "t.json")]
    assert main(made) == 0
    command = ["train", *data, "--tokenizer", str(folder / "t.json"), "--out", str(folder / "run"), *TINY]
    assert main(command) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *command: Any, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*map(str, command)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out if code == 0 else captured.err


def test_a_run_keeps_its_tokenizer(made: Path) -> None:
    config, tokenizer = read_config(made / "run"), load_tokenizer(made / "run")
    assert (made / "run" / "tokenizer.json").read_bytes() == (made / "t.json").read_bytes()
    assert json.loads((made / "run" / "config.json").read_text())["tokenizer"] == {
        "kind": "bpe",
        "size": 320,
        "sha256": tokenizer.sha256,
    }
    assert config.field == "body"
    assert load_model(made / "run").num_tokens == 320


def test_a_resumed_run_goes_on_with_its_tokenizer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(made / "run", out)
    shutil.rmtree(out / "checkpoints" / "step-000000004")
    assert "validation: " in said(capsys, "train", "--out", out, "--resume")
    assert (out / "model.safetensors").read_bytes() == (made / "run" / "model.safetensors").read_bytes()
    other, other_flags = tmp_path / "other.json", ["--vocab-size", "320", "--limit-bytes", "5000"]
    said(capsys, "tokenizer", "train", made / "data.jsonl", "--field", "body", *other_flags, "--out", other)
    message = said(capsys, "train", "--out", out, "--resume", "--tokenizer", other, code=2)
    assert "has another tokenizer" in message
    assert "field is 'body', not 'text'" in said(
        capsys, "train", "--out", out, "--resume", "--steps", "9", "--field", "text", code=2
    )
    shutil.copy(other, out / "tokenizer.json")
    for command in (["generate", out, "--prompt", "a"], ["eval", out, other], ["train", "--out", out, "--resume"]):
        assert "it is not the tokenizer of this run" in said(capsys, *command, code=2)
    (out / "tokenizer.json").unlink()
    assert "cannot read the tokenizer" in said(capsys, "generate", out, "--prompt", "a", code=2)


def test_text_is_generated_piece_by_piece(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, tokenizer, model = made / "run", load_tokenizer(made / "run"), load_model(made / "run")
    prompt = "7 times “7"
    ids = torch.from_numpy(tokenizer.encode(prompt.encode()).astype(np.int64))[None]
    found = model.generate(ids, 30, temperature=0.8, seed=3, stop=[[tokenizer.end]])[0]

    def shown(row: torch.Tensor) -> str:
        return tokenizer.decode(row.tolist()).decode(errors="replace") + "\n"

    command = ["generate", run, "--prompt", prompt, "--tokens", "30"]
    assert said(capsys, *command, "--seed", "3") == shown(found)
    best = model.generate(ids, 30, num_beams=2, stop=[[tokenizer.end]])[0]
    assert said(capsys, *command, "--num-beams", "2") == shown(best)
    capsys.readouterr()
    assert main([*map(str, command), "--draft", str(run), "--temperature", "0", "--stats"]) == 0
    assert " tokens/s; " in capsys.readouterr().err


def test_generation_stops_on_a_text_however_it_is_cut(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", made / "run", "--prompt", "7 times", "--tokens", "40", "--seed", "3"]
    whole = said(capsys, *command)[:-1]
    new = whole[len("7 times") :]
    for start in range(0, len(new) - 3, 5):
        stop = new[start : start + 3]
        if "\ufffd" not in stop:
            assert said(capsys, *command, "--stop", stop) == "7 times" + new[: new.index(stop) + 3] + "\n"
    assert said(capsys, *command, "--stop", "never there") == whole + "\n"
    assert "must not be empty" in said(capsys, *command, "--stop", "", code=2)
    assert "needs a model of bytes" in said(capsys, *command[:-2], "--stop", "a", "--num-beams", "2", code=2)


def test_a_stop_is_found_across_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [b"on", b"e t", b"", b"w", b"o ", b"three"]
    for stop, shown in ((b"e two", "one two"), (b"two t", "one two t"), (b"o", "o"), (b"x", "one two three")):
        _write(b">o", iter(pieces), [b"never", stop])
        assert capsys.readouterr().out == f">o{shown}\n"
    _write("ü".encode(), ["ü".encode()[:1], "ü".encode()[1:]], [])
    assert capsys.readouterr().out == "üü\n"


def test_generation_ends_with_the_document(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    run, tokenizer = tmp_path / "run", load_tokenizer(made / "run")
    shutil.copytree(made / "run", run)
    tensors = load_file(run / "model.safetensors")
    # A model of nothing but ends.
    tensors["token_emb.weight"].fill_(1.0)
    [name] = [name for name in tensors if name.startswith("to_logits") and name.endswith("weight")]
    tensors[name].zero_()
    tensors[name][tokenizer.end] = 100
    save_file(tensors, run / "model.safetensors")
    out = said(capsys, "generate", run, "--prompt", "7 times", "--tokens", "30", "--temperature", "0")
    assert len(out) < len("7 times") + 30


def test_drafts_and_states_are_of_the_same_tokenizer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(made / "data.jsonl"), "--field", "body", "--out", str(tmp_path / "bytes"), *TINY]) == 0
    message = said(capsys, "generate", made / "run", "--prompt", "a", "--draft", tmp_path / "bytes", code=2)
    assert "has another tokenizer" in message


def test_reading_counts_bytes_and_goes_on(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, state, text = made / "run", tmp_path / "state", tmp_path / "text.zst"
    content = TEXT[:700]
    import zstandard

    text.write_bytes(zstandard.ZstdCompressor().compress(content))
    result = json.loads(said(capsys, "read", run, text, "--state", state, "--json"))
    assert (result["bytes"], result["position"]) == (700, 700)
    command = ["--tokens", "20", "--temperature", "0"]
    whole = said(capsys, "generate", run, "--prompt", content.decode(), *command)
    assert content.decode() + said(capsys, "generate", run, "--state", state, *command) == whole


def test_a_text_is_read_alike_in_any_blocks(made: Path) -> None:
    model, tokenizer = load_model(made / "run").double(), load_tokenizer(made / "run")
    whole = read(model, io.BytesIO(TEXT), tokenizer=tokenizer)
    other = read(model, [TEXT[n : n + 13] for n in range(0, len(TEXT), 13)], tokenizer=tokenizer)
    assert whole[1:] == other[1:]
    assert whole.position == len(TEXT)
    last = torch.tensor([[whole.last]])
    torch.testing.assert_close(model(last, whole.state), model(last, other.state), rtol=1e-9, atol=1e-9)


def test_evaluation_is_per_byte_of_each_document(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tokenizer, model = made / "run", load_tokenizer(made / "run"), load_model(made / "run").double()
    nats, size = 0.0, 0
    for text in TEXTS[:5]:
        ids = torch.tensor([[*tokenizer.encode(text.encode()).tolist(), tokenizer.end]])
        nats += model(ids, return_loss=True).item() * (ids.shape[1] - 1)
        size += len(text.encode()) - len(tokenizer.pieces[int(ids[0, 0])])
    path = tmp_path / "few.jsonl"
    path.write_bytes(lines([*TEXTS[:5], "", "x"], "body"))
    result = json.loads(said(capsys, "eval", run, path, "--field", "body", "--json"))
    assert result["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-4)
    assert (result["bytes"], result["documents"], result["files"]) == (sum(len(t.encode()) for t in TEXTS[:5]), 5, 1)
    give(monkeypatch, path.read_bytes())
    assert json.loads(said(capsys, "eval", run, "-", "--field", "body", "--json")) == result
    assert main(["eval", str(run), str(path), "--field", "body"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(" bytes in 5 documents\n")
    assert captured.err == (
        "gateloop eval: 1 empty document left out\ngateloop eval: 1 single-byte document left out\n"
    )


def test_a_run_on_standard_input_is_resumed_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    give(monkeypatch, TEXT)
    assert "standard input: 1 file, " in said(capsys, "train", "-", "--out", out, *TINY)
    give(monkeypatch, b"")
    assert "after 6 steps" in said(capsys, "train", "--out", out, "--resume", "--steps", "6")
    monkeypatch.setenv("GATELOOP_CACHE", str(tmp_path / "empty"))
    message = said(capsys, "train", "--out", out, "--resume", "--steps", "8", code=2)
    assert "no longer in the cache: give it on standard input again" in message
    give(monkeypatch, TEXT)
    assert "after 8 steps" in said(capsys, "train", "-", "--out", out, "--resume", "--steps", "8")
    give(monkeypatch, TEXT[:-1])
    monkeypatch.setenv("GATELOOP_CACHE", str(tmp_path / "other"))
    assert "the data has changed" in said(capsys, "train", "-", "--out", out, "--resume", "--steps", "9", code=2)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_windows_are_scored_document_by_document(made: Path, kind: str) -> None:
    """A window with a border costs what its documents cost alone."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer_file(made / "t.json") if kind == "bpe" else ByteTokenizer()
    model = Transformer(16, num_tokens=tokenizer.size, depth=2, gate_loop_heads=4, conv_size=3).double()
    parts = [tokenizer.encode(text.encode()).astype(np.int64) for text in TEXTS[:4]]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    tokens = Tokens.of(np.concatenate(parts), starts)
    alone = [score(model, [part], tokenizer, block=7) for part in parts]
    expected = sum(each.nats for each in alone) / sum(each.size for each in alone) / math.log(2)
    assert validate(model, tokens, len(tokens) - 1, 10**6, 4, tokenizer) == pytest.approx(expected, rel=1e-9)
    windows = validate(model, tokens, 16, 10**6, 4, tokenizer)
    assert windows == pytest.approx(validate(model, tokens, 16, 10**6, 1, tokenizer), rel=1e-9)


def test_windows_without_a_byte_are_refused(made: Path) -> None:
    tokenizer = load_tokenizer_file(made / "t.json")
    model = Transformer(16, num_tokens=tokenizer.size, depth=1, gate_loop_heads=4)
    tokens = Tokens.of([5, tokenizer.end])
    with pytest.raises(ValueError, match="no byte was predicted"):
        validate(model, tokens, 16, 100, 4, tokenizer)


@pytest.mark.parametrize(
    "value",
    [None, "words", {"kind": "words"}, {"kind": "bpe"}, {"kind": "bpe", "size": "320", "sha256": "a"}, 3],
)
def test_unknown_tokenizers_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    config = json.loads((made / "run" / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tokenizer": value}))
    assert "tokenizer" in said(capsys, "generate", out, "--prompt", "a", code=2)
