"""gateloop tasks: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateloop_transformer.cli import main
from gateloop_transformer.tasks.table import TASKS

QUICK = ["--steps", "3", "--tokens", "64", "--dim", "8", "--gate-loop-heads", "2", "--rows", "8", "--lengths", "9,12"]


def test_json_is_one_object_and_the_files_are_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert main(["tasks", "counting", "--modulus", "4", "--out", str(out), "--json", *QUICK]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    (line,) = printed.splitlines()
    result = json.loads(line)
    assert result == json.loads((out / "result.json").read_text())
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (result["task"], result["model"], result["gate"], result["steps"]) == ("counting", "gateloop", "ring", 3)
    assert list(result["accuracy_by_length"]) == list(result["accuracy_of_all_by_length"]) == ["9", "12"]
    assert all(0 <= right <= 1 for right in result["accuracy_by_length"].values())
    assert result["chance"] == 0.25
    assert result["seconds"] > 0
    assert result["options"]["task"] == {"modulus": 4, "marks": 2}
    assert result["options"]["training"]["lengths"] == "9,12"
    assert result["options"]["model"]["dim"] == 8
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.png", "result.json"]


def test_a_table_for_readers_with_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tasks", "horizon", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("horizon: gateloop, ")
    assert [line.split()[0] for line in lines[2:4]] == ["9", "12"]
    assert "span" in lines[4]
    assert (tmp_path / "runs/tasks/horizon/accuracy.png").exists()


@pytest.mark.parametrize("flags", [[], ["--list"]])
def test_the_list_has_a_line_for_each(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TASKS)
    assert all(task.summary in line for task, line in zip(TASKS.values(), lines, strict=True))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["counting", "--modulus", "1"], "modulus must be at least 2"),
        (["parity", "--lengths", "x"], "numbers and commas"),
        (["parity", "--dim", "7", "--gate-loop-heads", "2"], "heads must divide"),
        (["--list", "parity"], "--list takes no NAME"),
        (["digits", "--longest", "65"], "length of 64"),
        (["digits", "--lengths", "65"], "length of 64"),
        (["parity", "--lengths", "40,-5"], "lengths: parity has none below 2, not -5"),
        (["parity", "--lengths", "40,1000000000000"], "64 sequences of 1,000,000,000,000 tokens is too large"),
        (["parity", "--rows", "1000000000000"], "1,000,000,000,000 sequences of 40 tokens is too large"),
        (["parity", "--model", "lstm", "--gate", "polar", "--max-memory", "8"], "model lstm has no gate, max_memory"),
        (["parity", "--model", "transformer", "--ablate-complex"], "model transformer has no ablate_complex"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--list" in flags else ["--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(["tasks", *flags, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.startswith("gateloop tasks: error: ")


@pytest.mark.parametrize(
    "flags",
    [
        ["nothing"],
        ["parity", "--gate", "square"],
        ["parity", "--modulus", "3"],
        ["counting", "--modulo", "3"],
        ["parity", "--steps", "many"],
    ],
)
def test_unknown_words_are_refused_in_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["tasks", *flags])
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_results_that_nobody_named_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in "123":
        assert main(["tasks", "parity", "--seed", seed, *QUICK]) == 0
    assert "'runs/tasks/parity' already has results: these go to 'runs/tasks/parity-3'" in capsys.readouterr().err
    for folder, seed in (("parity", 1), ("parity-2", 2), ("parity-3", 3)):
        assert json.loads((tmp_path / "runs" / "tasks" / folder / "result.json").read_text())["seed"] == seed


def test_attention_and_gates_mixed_read_both(tmp_path: Path) -> None:
    flags = ["--model", "transformer", "--layer-pattern", "attention gate", "--gate", "polar"]
    assert main(["tasks", "parity", "--out", str(tmp_path), *flags, *QUICK]) == 0


def test_a_folder_that_cannot_be_made_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["tasks", "parity", "--out", str(tmp_path / "file"), *QUICK]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
