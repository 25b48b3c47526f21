"""gateloop inspect: what is written and said, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gateloop_transformer.cli import main

TEXT = "".join(f"{n} times {n} is {n * n}, ünd so.\n" for n in range(60)).encode()
MODEL = ["--dim", "8", "--depth", "2", "--gate-loop-heads", "2", "--context", "16", "--batch", "2", "--steps", "1"]
MODEL += ["--layer-pattern", "gate attention", "--heads", "2", "--dim-head", "4", "--eval-bytes", "64"]
MODEL += ["--sample-bytes", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "data.txt").write_bytes(TEXT)
    (folder / "data.txt.gz").write_bytes(gzip.compress(TEXT))
    assert main(["train", str(folder / "data.txt"), "--out", str(folder / "run"), *MODEL]) == 0
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *command: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["inspect", *map(str, command)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def test_a_text_is_read_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, run, "--text", "7 times 7 is 49.\nSo <it> is: ü", "--json")
    result = json.loads(out, parse_constant=pytest.fail)
    assert err == ""
    assert (result["tokens"], result["bytes"], result["cut"]) == (31, 31, False)
    assert result["page"] == str(run / "inspect" / "index.html")
    names = ["layer-1.png", "spectrum.png", "classes.png"]
    assert [Path(image).name for image in result["images"]] == names
    assert all(Path(image).read_bytes().startswith(b"\x89PNG") for image in result["images"])
    assert "<h1>run on a text</h1>" in Path(result["page"]).read_text()
    gate, attention = result["layers"]
    assert (gate["heads"], attention["heads"]) == (2, 0)
    assert {"newline", "first of a line", "space", "first of a word"} <= gate["by_class"].keys()
    assert sum(row["tokens"] for row in result["by_position"]) == 30
    assert sum(row["tokens"] for row in result["by_distance"]) == 30
    # Of a deeper model that was inspected before.
    (run / "inspect" / "layer-3.png").write_bytes(b"")
    out, _ = said(capsys, run, "--text", "once more")
    assert sorted(path.name for path in (run / "inspect").glob("*.png")) == sorted(names)
    assert "layer 1: half-lives of " in out
    assert "layer 2: attention, 2 heads of size 4: attention has no gates" in out


def test_the_beginning_of_a_file_is_shown_and_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, run, "--file", run.parent / "data.txt.gz", "--tokens", "40", "--out", tmp_path, "--json")
    assert (json.loads(out)["tokens"], json.loads(out)["cut"]) == (40, True)
    assert err == "gateloop inspect: only the first 40 tokens of the text are shown: --tokens N takes more\n"
    assert "only the first 40 tokens" in (tmp_path / "index.html").read_text()
    out, err = said(capsys, run, "--text", TEXT[:40].decode(), "--tokens", "40", "--out", tmp_path, "--json")
    assert (json.loads(out)["cut"], err) == (False, "")


@pytest.mark.parametrize("option", ["--ablate-complex", "--ablate-state-transition"])
def test_models_with_tokens_of_bpe_and_ablated_gates(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    data = str(run.parent / "data.txt")
    assert main(["tokenizer", "train", data, "--vocab-size", "270", "--out", str(tmp_path / "t.json")]) == 0
    train = ["train", data, "--tokenizer", str(tmp_path / "t.json"), "--out", str(tmp_path / "run"), *MODEL, option]
    assert main(train) == 0
    out, _ = said(capsys, tmp_path / "run", "--text", "7 times\n7", "--json")
    result = json.loads(out, parse_constant=pytest.fail)
    assert result["bytes"] == 9 > result["tokens"]
    assert result["same_tokens"] == 2
    if option == "--ablate-state-transition":
        assert set(result["layers"][0]["half_life"].values()) == {"∞"}


def test_of_gates_that_are_the_same_everywhere_none_fade_fastest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, options = str(run.parent / "data.txt"), ["--gate", "ring", "--fixed-gates"]
    assert main(["train", data, "--out", str(tmp_path / "run"), *MODEL, *options]) == 0
    out, _ = said(capsys, tmp_path / "run", "--text", "7 times\n7")
    assert "layer 1: half-lives of " in out
    assert "fades fastest" not in out


def test_what_cannot_be_inspected_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "index.html").write_text("<p>my own</p>")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "layer-1.png").write_text("my own")
    for command, problem in (
        ([tmp_path, "--text", "ab"], "holds no run"),
        ([run, "--text", "a"], "at least 2 tokens is needed, not of 1"),
        ([run, "--text", ""], "not of 0"),
        ([run, "--file", tmp_path / "absent"], "cannot read"),
        ([run, "--text", "ab", "--tokens", "1"], "--tokens must be from 2 to 4000"),
        ([run, "--text", "ab", "--tokens", "4001"], "--tokens must be from 2 to 4000"),
        ([run, "--text", "ab", "--out", tmp_path / "file"], "is a file, not a folder"),
        ([run, "--text", "ab", "--out", tmp_path / "own"], "is not a page of 'gateloop inspect'"),
        ([run, "--text", "ab", "--out", tmp_path / "pictures"], "is not from 'gateloop inspect'"),
        ([run, "--text", "ab", "--checkpoint", "77"], "77"),
    ):
        _, err = said(capsys, *command, code=2)
        assert problem in err
        assert len(err.splitlines()) == 1, err
    with pytest.raises(SystemExit):
        main(["inspect", str(run), "--text", "ab", "--file", "x"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "new"
    assert "gateloop-transformer[train]" in said(capsys, run, "--text", "ab", "--out", out, code=2)[1]
    assert (tmp_path / "own" / "index.html").read_text() == "<p>my own</p>"
    assert (tmp_path / "pictures" / "layer-1.png").read_text() == "my own"
