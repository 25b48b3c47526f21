"""A run's folder: what is in it, who may train there, what is refused and what is spared."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import TEXT, error_of, metrics, steps_of, train

from gateloop_transformer.cli import main
from gateloop_transformer.runs import folder
from gateloop_transformer.runs.config import FORMAT


def test_a_run_leaves_model_config_metrics_curve_and_checkpoints(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out) == 0
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "tensorboard",
        "tokenizer.json",
        "tokenizer_config.json",
        ".lock",
    }
    assert steps_of(out) == [6, 8]
    records = metrics(out)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 9))
    assert [record["step"] for record in records if "bits_per_byte" in record] == [4, 8]
    assert records[0]["tokens"] == 4 * 32
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((out / "config.json").read_text())
    assert stored["training"]["steps"] == 8
    assert stored["model"]["gate"] == "ring"


def test_a_file_system_without_locks_is_said(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_file: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert train(text, tmp_path / "run", steps=1) == 0


def test_two_runs_that_start_together_do_not_replace_each_other(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, look = tmp_path / "run", folder.check_folder

    def look_then_lose(*arguments: Any) -> None:
        look(*arguments)
        monkeypatch.undo()
        assert train(text, out, steps=1) == 0
        capsys.readouterr()

    monkeypatch.setattr(folder, "check_folder", look_then_lose)
    assert train(text, out, steps=3) == 2
    assert "already holds a run" in error_of(capsys)
    assert metrics(out)[-1]["step"] == 1


@pytest.mark.parametrize("name", ["checkpoints", "model.safetensors"])
def test_files_and_folders_in_each_others_place_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=1) == 0
    if name == "checkpoints":
        shutil.rmtree(out / name)
        (out / name).write_text("")
    else:
        (out / name).unlink()
        (out / name).mkdir()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    for flags in (["--resume"], ["--overwrite"]):
        assert main(["train", "--out", str(out), *flags]) == 2
        assert f"{name}' is a f" in error_of(capsys)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_run_is_not_overwritten_unasked(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out) == 0
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(text, out, steps=3) == 2
    assert "--resume" in error_of(capsys)
    assert train(tmp_path / "absent", out, "--overwrite") == 2
    assert "no file" in error_of(capsys)
    assert train(text, out, "--overwrite", "--gate-loop-heads", "5") == 2
    assert "divide" in error_of(capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert train(text, out, "--overwrite", steps=3) == 0
    assert metrics(out)[-1]["step"] == 3
    assert (out / "notes.txt").read_text() == "mine"


def damage(out: Path, name: str) -> str:
    """Each way a run can be unreadable, and what the message must contain."""
    model, config = out / "model.safetensors", out / "config.json"
    values = json.loads(config.read_text())
    if name == "truncated":
        model.write_bytes(model.read_bytes()[:-100])
        return "damaged"
    if name == "no weights":
        model.unlink()
        return "no checkpoint of its run was finished"
    if name == "no config":
        config.unlink()
        return "holds no run"
    if name == "broken config":
        config.write_text(config.read_text()[:-30])
        return "config.json' is not JSON"
    if name == "other configuration":
        values["model"]["dim"] = 32
    elif name == "newer format":
        values["format"] = FORMAT + 1
    elif name == "older format":
        values["format"] = FORMAT - 1
    elif name == "unknown field":
        values["model"]["wings"] = 2
    elif name == "missing field":
        del values["training"]["lr"]
    elif name == "wrong type":
        values["model"]["dim"] = "wide"
    elif name == "wrong size":
        values["model"]["dim"] = -1
    elif name == "wrong rate":
        values["training"]["lr"] = -1
    config.write_text(json.dumps(values))
    return {
        "other configuration": "does not fit",
        "newer format": f"is of format {FORMAT + 1}, which a newer version",
        "older format": f"is of format {FORMAT - 1}, which no release",
        "unknown field": "wings",
        "missing field": "missing: lr",
        "wrong type": "dim must be",
        "wrong size": "config.json': Transformer: sizes must be whole numbers of at least 1",
        "wrong rate": "config.json', training: lr must be",
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "truncated",
        "no weights",
        "no config",
        "broken config",
        "other configuration",
        "newer format",
        "older format",
        "unknown field",
        "missing field",
        "wrong type",
        "wrong size",
        "wrong rate",
    ],
)
def test_unreadable_runs_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=1) == 0
    message = damage(out, name)
    capsys.readouterr()
    commands = [["generate", str(out), "--prompt", "a"], ["eval", str(out), str(text)]]
    if name.startswith("wrong"):
        commands.append(["train", "--out", str(out), "--resume"])
    for command in commands:
        assert main(command) == 2
        assert message in error_of(capsys)


def test_overwrite_spares_what_is_not_the_runs(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=1) == 0
    precious = out / "checkpoints" / "mine" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    assert train(text, out, "--overwrite", steps=1) == 0
    assert precious.read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "loss.png").write_text("my picture")
    capsys.readouterr()
    for flags in ([], ["--overwrite"]):
        assert train(text, other, *flags) == 2
        error_of(capsys)
    assert (other / "loss.png").read_text() == "my picture"


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', '{"format": 1, "editor": "mine"}', "[1, 2", ""])
def test_a_config_that_is_not_a_runs_is_never_deleted(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(content)
    for flags in ([], ["--overwrite"]):
        assert train(text, tmp_path, *flags) == 2
        assert "holds config.json, but not a run's" in error_of(capsys)
    assert [(tmp_path / name).read_text() for name in ("config.json", "model.safetensors")] == [content] * 2


def test_another_model_of_the_same_shapes_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--gate", "polar", steps=3) == 0
    values = json.loads((out / "config.json").read_text())
    values["model"]["gate"] = "paper"
    (out / "config.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["eval", str(out), str(text)]) == 2
    assert "was written for" in error_of(capsys)
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 2
    assert "was written for" in error_of(capsys)


def test_everyone_may_read_a_model_whom_the_umask_lets(text: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert train(text, tmp_path / "run", steps=1) == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}


@pytest.mark.parametrize("command", [["generate", "", "--prompt", "a"], ["eval", "", "data"], ["train", "--out", ""]])
def test_an_empty_folder_name_is_not_the_current_folder(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 2
    assert "expected a folder, not an empty string" in error_of(capsys)


def test_a_run_is_not_put_among_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    assert train(tmp_path, tmp_path) == 2
    assert "is the folder of the data; choose another for the run" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
