"""What is done with a trained model from the command line: generate and eval."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import TEXT, error_of, metrics, train

from gateloop_transformer import Transformer, quantize
from gateloop_transformer.cli import main
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.evaluation.bits import score, validate
from gateloop_transformer.runs.folder import load_model


def test_json_is_one_object(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 8
    assert result["bits_per_byte"] == metrics(out)[-1]["bits_per_byte"]
    assert main(["eval", str(out), str(text), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["bytes"] == len(TEXT)
    assert 0 < evaluation["bits_per_byte"] < 9


def test_generate_prints_prompt_and_continuation(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out) == 0
    capsys.readouterr()
    command = ["generate", str(out), "--prompt", "ünd 1", "--tokens", "20", "--seed", "1"]
    texts = []
    for _ in range(2):
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("ünd 1")
    model = load_model(out)
    ids = model.generate(torch.tensor([list("ünd 1".encode())]), 20, temperature=0.8, seed=1)
    assert texts[0] == bytes(ids[0].tolist()).decode(errors="replace") + "\n"


def test_generate_with_beams_or_a_draft(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, small = tmp_path / "run", tmp_path / "small"
    assert train(text, out) == 0
    assert train(text, small, "--dim", "8", "--depth", "1") == 0
    capsys.readouterr()
    command = ["generate", str(out), "--prompt", "1 times", "--tokens", "20"]
    model = load_model(out)
    ids = torch.tensor([list(b"1 times")])

    def said(*flags: str) -> tuple[str, str]:
        assert main([*command, *flags]) == 0
        captured = capsys.readouterr()
        return captured.out.rstrip("\n"), captured.err

    def shown(row: torch.Tensor) -> str:
        return bytes(row.tolist()).decode(errors="replace").rstrip("\n")

    best = model.generate(ids, 20, num_beams=3, length_penalty=0.5)[0]
    assert said("--num-beams", "3", "--length-penalty", "0.5") == (shown(best), "")
    greedy = shown(model.generate(ids, 20, temperature=0)[0])
    text_out, stats = said("--temperature", "0", "--draft", str(small), "--draft-tokens", "3", "--stats")
    assert text_out == greedy
    assert re.fullmatch(r"20 bytes in [\d.]+ s, [\d.]+ bytes/s; \d+ of \d+ drafted bytes accepted \(\d+%\)\n", stats)
    assert re.fullmatch(r"20 bytes in [\d.]+ s, [\d.]+ bytes/s\n", said("--stats")[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_generate_and_eval_with_smaller_weights(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    out = tmp_path / "run"
    assert train(text, out) == 0
    capsys.readouterr()
    small = quantize(load_model(out), dtype)
    assert main(["generate", str(out), "--prompt", "a", "--tokens", "9", "--seed", "1", "--dtype", dtype]) == 0
    ids = small.generate(torch.tensor([[97]]), 9, temperature=0.8, seed=1)
    assert capsys.readouterr().out == bytes(ids[0].tolist()).decode(errors="replace") + "\n"
    found = []
    for which in ("float32", dtype):
        assert main(["eval", str(out), str(text), "--json", "--dtype", which]) == 0
        found.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_eval_reads_any_bytes(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=1) == 0
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 2)
    capsys.readouterr()
    assert main(["eval", str(out), str(tmp_path / "binary"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 512


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "RUN", "--prompt", ""], "must not be empty"),
        (["generate", "RUN", "--prompt", "a", "--tokens", "-1"], "--tokens must be 0 or more, not -1"),
        (["generate", "RUN", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["generate", "RUN", "--prompt", "a", "--stop", ""], "--stop must not be empty"),
        (["generate", "RUN", "--prompt", "a", "--seed", str(2**64)], "--seed must be in"),
        (["generate", "RUN", "--prompt", "a", "--num-beams", "0"], "--num-beams must be"),
        (["generate", "RUN", "--prompt", "a", "--num-beams", "2", "--temperature", "1"], "leave out temperature"),
        (["generate", "RUN", "--prompt", "a", "--num-beams", "2", "--draft", "RUN"], "leave out draft"),
        (["generate", "RUN", "--prompt", "a", "--num-beams", "2", "--length-penalty", "inf"], "--length-penalty"),
        (["generate", "RUN", "--prompt", "a", "--draft", "absent"], "no folder"),
        (["generate", "RUN", "--prompt", "a", "--draft", "RUN", "--draft-tokens", "0"], "--draft-tokens must be"),
        (["generate", "absent", "--prompt", "a"], "no folder"),
        (["generate", "ONE", "--prompt", "a"], "is a file, not the folder of a run"),
        (["eval", "ONE", "ONE"], "at least 2 bytes"),
        (["eval", "ONE", "DATA"], "is a file, not the folder of a run"),
        (["train", "--out", "ONE"], "is a file, not a folder"),
        (["train", "DATA", "--out", "BELOW"], "cannot make the folder"),
        (["eval", "RUN", "absent"], "no file"),
        (["eval", "RUN", ""], "must not be empty"),
        (["eval", "RUN", "EMPTY"], "is empty"),
        (["eval", "RUN", "ONE"], "at least 2 bytes"),
        (["eval", "absent", "EMPTY"], "is empty"),
    ],
)
def test_wrong_arguments_of_generate_and_eval(
    text: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    places = {"RUN": str(finished), "EMPTY": str(tmp_path / "empty"), "ONE": str(tmp_path / "one"), "DATA": str(text)}
    places["BELOW"] = str(tmp_path / "one" / "run")
    capsys.readouterr()
    assert main([places.get(word, word) for word in command]) == 2
    assert message in error_of(capsys)


def test_evaluation_carries_state_whatever_the_block() -> None:
    torch.manual_seed(0)
    model = Transformer(16, num_tokens=256, depth=2, gate_loop_heads=4, conv_size=3).double()
    data = np.frombuffer(TEXT[:500].encode(), dtype=np.uint8)
    ids = torch.from_numpy(data.astype(np.int64))[None]
    expected = model(ids, return_loss=True).item() / np.log(2)
    for block in (1, 7, 100, 499, 500, 5000):
        assert score(model, [data], ByteTokenizer(), block).bits_per_byte == pytest.approx(expected, rel=1e-10)
    assert validate(model, Tokens.of(data), 499, 10**6, 4) == pytest.approx(expected, rel=1e-6)
