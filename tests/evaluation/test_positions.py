"""Losses by position and distance: against whole windows, word by word, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gateloop_transformer import Transformer
from gateloop_transformer.cli import main
from gateloop_transformer.data.bpe import train_tokenizer
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.evaluation import positions
from gateloop_transformer.evaluation.positions import full_windows, spread, tokens_on_disk, windows_up_to
from gateloop_transformer.evaluation.spans import distances_to_same, doubling_spans, spans_of
from gateloop_transformer.evaluation.suite import perplexities, windows
from gateloop_transformer.runs.config import flat
from gateloop_transformer.runs.folder import read_config

TEXT = "".join(f"{n} times {n} is {n * n}, ünd so.\n" for n in range(60)).encode()
MODEL = ["--dim", "8", "--depth", "1", "--gate-loop-heads", "2", "--context", "16", "--batch", "2", "--steps", "2"]
MODEL += ["--eval-bytes", "64", "--sample-bytes", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("positions")
    (folder / "data.txt").write_bytes(TEXT)
    assert main(["train", str(folder / "data.txt"), "--out", str(folder / "run"), *MODEL]) == 0
    return folder / "run"


@pytest.mark.parametrize(("last", "anchor"), [(1, 1), (1, 100), (16384, 256), (1000, 100), (300, 100), (7, 64)])
def test_spans_cover_everything_once_and_end_at_the_anchor(last: int, anchor: int) -> None:
    spans = doubling_spans(last, anchor)
    assert [n for span in spans for n in range(span.first, span.last + 1)] == list(range(1, last + 1))
    assert anchor > last or anchor in [span.last for span in spans]
    assert all(span.last <= 2.5 * span.first for span in spans)
    for value in (1, last, min(anchor, last)):
        first, end = spans[int(spans_of(np.array([value]), spans)[0])]
        assert first <= value <= end


def test_spans_double_from_the_anchor_both_ways() -> None:
    ends = [span.last for span in doubling_spans(1000, 100)]
    assert ends == [2, 3, 6, 12, 25, 50, 100, 200, 400, 800, 1000]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_distances_are_those_found_by_looking(count: int) -> None:
    ids = np.random.default_rng(count).integers(0, 3, 200)
    expected = []
    for t in range(len(ids)):
        before = [u for u in range(count, t) if (ids[u - count : u] == ids[t - count : t]).all()] if t > count else []
        expected.append(t - before[-1] if before else 0)
    assert distances_to_same(ids, count).tolist() == expected
    assert distances_to_same(ids[:count], count).tolist() == [0] * count


def test_windows_lie_within_documents() -> None:
    tokens = Tokens.of(np.arange(40), [0, 3, 3, 20])
    assert full_windows(tokens, 4).tolist() == [3, 7, 11, 15, 20, 24, 28, 32]
    assert full_windows(tokens, 17).tolist() == [20]
    assert full_windows(tokens, 20).tolist() == []
    assert windows_up_to(tokens, 2, None)[1] == 2
    assert windows_up_to(tokens, 2, 8)[0].tolist() == [3, 20]
    with pytest.raises(ValueError, match=r"of more than 20 tokens; the longest has 20"):
        windows_up_to(tokens, 20, None)
    with pytest.raises(ValueError, match="at least 1"):
        windows_up_to(tokens, 2, 0)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_losses_are_those_of_whole_windows(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(positions, "_BLOCK", 7)
    monkeypatch.setattr(positions, "_ROWS", 2)
    tokenizer = ByteTokenizer() if kind == "bytes" else train_tokenizer([[TEXT]], 280)
    model = Transformer(8, num_tokens=tokenizer.size, depth=2, layer_pattern="gate attention", conv_size=3).double()
    tokens, length, starts = Tokens.of(tokenizer.encode(TEXT)), 32, np.array([0, 40, 90])
    spans = doubling_spans(length, 16)
    found = spread(model, tokens, starts, length, spans, tokenizer)
    rows = torch.from_numpy(np.stack([tokens.read(start, start + length + 1) for start in starts.tolist()]))
    logits = model(rows[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(3, length)
    for row, span in zip(found.by_position(), spans, strict=True):
        part = slice(span.first - 1, span.last)
        size = int(tokenizer.lengths[rows[:, 1:][:, part].numpy()].sum())
        right = (logits.argmax(-1) == rows[:, 1:])[:, part]
        assert (row["from"], row["to"], row["tokens"]) == (*span, right.numel())
        assert row["loss"] == pytest.approx(nats[:, part].mean().item(), rel=1e-9)
        assert row["bits_per_byte"] == pytest.approx(nats[:, part].sum().item() / size / math.log(2), rel=1e-9)
        assert row["accuracy"] == pytest.approx(right.double().mean().item())
    distances = np.stack([distances_to_same(row.numpy(), found.same) for row in rows])[:, 1:]
    again = rows.numpy()[np.arange(3)[:, None], np.arange(1, length + 1) - distances] == rows[:, 1:].numpy()
    for far in found.by_distance():
        never = far["from"] is None or far["to"] is None
        own = distances == 0 if never else (distances >= far["from"]) & (distances <= far["to"])
        assert far["tokens"] == own.sum()
        assert far["loss"] == pytest.approx(nats.detach().numpy()[own].mean(), rel=1e-9)
        assert far["again"] == (0 if never else pytest.approx(again[own].mean()))
    assert sum(int(far["tokens"] or 0) for far in found.by_distance()) == 3 * length


def test_groups_without_a_byte_have_no_bits_per_byte_and_damage_is_said() -> None:
    costs = positions.Costs.none(1)
    costs.add(np.array([0]), np.array([2.0]), np.array([0]), np.array([True]), np.array([False]))
    assert costs.row(0) == {"tokens": 1, "loss": 2.0, "bits_per_byte": None, "accuracy": 1.0}
    model = Transformer(8, num_tokens=256, depth=1)
    torch.nn.init.constant_(model.token_emb.weight, math.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        spread(model, Tokens.of(np.arange(9)), np.array([0]), 8, doubling_spans(8), ByteTokenizer())


def test_documents_are_kept_apart_and_nothing_is_left_behind() -> None:
    with tokens_on_disk([[b"abc", b"de"], [b"f"]], ByteTokenizer()) as tokens:
        assert bytes(tokens.read(0, 6).astype(np.uint8)) == b"abcdef"
        assert tokens.starts(0, 6).tolist() == [0, 5]
        folder = positions.cache_folder() / "corpora"
        assert list(folder.glob("spool-*"))
    assert not list(folder.glob("spool-*"))


def said(capsys: pytest.CaptureFixture[str], *command: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["eval", *map(str, command)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def test_eval_says_losses_by_position(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, png = run.parent / "data.txt", tmp_path / "out.png"
    out, err = said(capsys, run, data, "--by-position", "--json", "--plot", png)
    result = json.loads(out)
    assert (result["context"], result["up_to"], result["windows"]) == (16, 8, len(TEXT) // 128)
    assert err == "gateloop eval: DATA is too short for 64 times the training context: up to 8\n"
    assert [row["to"] for row in result["by_position"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {"from", "to", "tokens", "loss", "bits_per_byte", "accuracy"} == result["by_position"][0].keys()
    assert result["by_distance"][-1]["from"] is None
    assert png.read_bytes().startswith(b"\x89PNG")
    out, err = said(capsys, run, data, "--by-position", "--up-to", "2", "--windows", "3", "--json")
    assert json.loads(out)["windows"] == 3
    assert {row["tokens"] for row in json.loads(out)["by_position"][-1:]} == {3 * 16}
    out, err = said(capsys, run, data, "--by-position", "--up-to", "2")
    assert (err, "2 x 16" in out, "17 to 32" in out, "never" in out) == ("", True, True, True)


def test_what_does_not_fit_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.parent / "data.txt"
    (tmp_path / "short.txt").write_bytes(TEXT[:16])
    for command, problem in (
        ([data, "--up-to", "2"], "--up-to goes with --by-position"),
        ([data, "--windows", "2"], "--windows goes with --by-position"),
        ([data, "--by-position", "--windows", "0"], "--windows must be at least 1"),
        ([data, "--plot", "x.png"], "--plot goes with --by-position"),
        ([data, "--suite", "--up-to", "2"], "--up-to goes with --by-position"),
        ([data, "--context", "2"], "--context goes with --by-position or --suite"),
        ([data, "--suite", "--context", "0"], "--context must be at least 1"),
        ([data, "--by-position", "--up-to", "0"], "--up-to must be at least 1"),
        ([data, "--by-position", "--up-to", "999"], "need a document of more than 15,984 tokens"),
        ([data, "--by-position", "--plot", tmp_path / "x.txt"], "must end in .png"),
        ([tmp_path / "short.txt", "--by-position"], "the longest has 16"),
    ):
        _, err = said(capsys, run, *command, code=2)
        assert problem in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_perplexities_are_those_of_whole_documents(kind: str) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else train_tokenizer([[TEXT]], 280)
    model = Transformer(8, num_tokens=tokenizer.size, depth=1).double()
    texts = [tokenizer.encode(TEXT[:300]), tokenizer.encode(b"a"), tokenizer.encode(TEXT[300:400])]
    lengths = [len(ids) for ids in texts]
    tokens = Tokens.of(np.concatenate(texts), np.cumsum([0, *lengths[:-1]]))
    found = perplexities(model, tokens, tokenizer)
    nats = sum(
        F.cross_entropy(model(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0], row, reduction="sum").item()
        for ids in texts
        if len(row := torch.from_numpy(ids[1:].astype(np.int64)))
    )
    size = sum(int(tokenizer.lengths[ids[1:]].sum()) for ids in texts)
    assert (found["predicted_tokens"], found["predicted_bytes"]) == (sum(lengths) - 3, size)
    assert found["loss"] == pytest.approx(nats / (sum(lengths) - 3), rel=1e-9)
    assert found["perplexity_per_token"] == pytest.approx(math.exp(nats / (sum(lengths) - 3)), rel=1e-9)
    assert found["perplexity_per_byte"] == pytest.approx(2 ** found["bits_per_byte"], rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-9)


def test_a_perplexity_beyond_all_numbers_is_null() -> None:
    model = Transformer(8, num_tokens=256, depth=1)
    model.to_logits = torch.nn.Linear(8, 256)
    torch.nn.init.zeros_(model.to_logits.weight)
    with torch.no_grad():
        model.to_logits.bias.zero_()[7] = -1e4
    found = perplexities(model, Tokens.of(np.full(9, 7)), ByteTokenizer())
    assert found["loss"] == pytest.approx(1e4 + math.log(255))
    assert found["perplexity_per_token"] is None


def test_windows_of_a_suite_are_as_long_as_documents_allow() -> None:
    tokens = Tokens.of(np.arange(60), [0, 20])
    assert (windows(tokens, 2).starts.tolist(), windows(tokens, 2).length) == ([20], 32)
    assert (windows(tokens, 1).starts.tolist(), windows(tokens, 1).length) == ([0, 20, 36], 16)
    assert (windows(tokens, 4).starts.tolist(), windows(tokens, 4).length) == ([20], 39)
    assert (windows(tokens, 1, 2).starts.tolist(), windows(tokens, 99).length) == ([0, 36], 39)


def test_a_suite_says_all_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, png = run.parent / "data.txt", tmp_path / "out.png"
    out, err = said(capsys, run, data, "--suite", "--json", "--plot", png)
    result, found = json.loads(out), json.loads(out)["length_generalisation"]
    assert err == ""
    assert result["bits_per_byte"] == json.loads(said(capsys, run, data, "--json")[0])["bits_per_byte"]
    assert (result["tokens"], result["bytes"], result["documents"]) == (len(TEXT), len(TEXT), 1)
    assert (found["context"], found["reached"], found["length"], found["windows"]) == (16, 16, 256, len(TEXT) // 256)
    by_position = json.loads(said(capsys, run, data, "--by-position", "--up-to", "16", "--json")[0])["by_position"]
    assert found["by_position"] == by_position
    assert png.read_bytes().startswith(b"\x89PNG")
    out, _ = said(capsys, run, data, "--suite", "--windows", "2")
    assert f"{result['perplexity_per_token']:,.4f} per token" in out
    assert "2 windows, from an empty state, of 256 tokens, 16 x the training context of 16" in out
    assert "too short" not in out
    (tmp_path / "short.txt").write_bytes(TEXT[:101])
    out, _ = said(capsys, run, tmp_path / "short.txt", "--suite")
    assert "DATA is too short for 16 x: its longest document has 101 tokens, but 257 are needed" in out
    assert "1 window, from an empty state, of 100 tokens, 6.25 x the training context of 16" in out
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(run), str(data), "--suite", "--by-position"])


def test_a_model_without_its_training_is_told_the_context(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run.parent / "data.txt"
    (tmp_path / "config.json").write_text(json.dumps(flat(read_config(run).model, 256)))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    for mode in ("--suite", "--by-position"):
        _, err = said(capsys, tmp_path, data, mode, code=2)
        assert "does not say what context it was trained with: pass it as --context T" in err
    out, _ = said(capsys, tmp_path, data, "--suite", "--context", "16", "--json")
    assert json.loads(out) == json.loads(said(capsys, run, data, "--suite", "--json")[0])
    out, _ = said(capsys, run, data, "--suite", "--context", "8", "--json")
    assert json.loads(out)["length_generalisation"]["length"] == 128
