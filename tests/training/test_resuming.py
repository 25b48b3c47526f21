"""Runs that go on: after an end, a kill or a change of settings, and on data that moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from halting import halted
from safetensors.torch import load_file
from small_runs import CARRIED, TEXT, TINY, error_of, metrics, train

from gateloop_transformer.cli import main


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dropout", "0.3", "--accumulate", "2"],
        pytest.param(["--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(CARRIED, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_never_stopped(text: Path, tmp_path: Path, flags: list[str]) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(text, whole, *flags, steps=10) == 0
    assert train(text, halves, *flags, steps=10) == 0
    for name in ("step-000000010", "step-000000009"):
        saved = halves / "checkpoints" / name
        for file in saved.iterdir():
            file.unlink()
        saved.rmdir()
    (halves / "model.safetensors").unlink()
    # Both kept checkpoints are gone: the run starts again from step 0 and must end in the same place.
    assert main(["train", "--out", str(halves), "--resume"]) == 0
    assert metrics(halves) == metrics(whole)
    assert (halves / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [pytest.param(["--dropout", "0.3"], marks=pytest.mark.slow), CARRIED])
def test_a_killed_run_continues_to_the_last_digit(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(text, whole, *flags, steps=16) == 0
    capsys.readouterr()
    process = halted(11, killed, str(text), *TINY, *flags, "--steps", "16")
    for how in ([], ["--overwrite"], ["--resume"]):
        assert main(["train", "--out", str(killed), *how]) == 2
        assert "another process is training in" in error_of(capsys)
    process.kill()
    processes.finish(process)
    assert main(["train", "--out", str(killed), "--resume"]) == 0
    assert metrics(killed) == metrics(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(text, whole) == 0
    killed.mkdir()
    (killed / "config.json").write_text((whole / "config.json").read_text())
    (killed / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    capsys.readouterr()
    assert train(text, killed) == 2
    assert "ended before its first checkpoint: replace it with --overwrite" in error_of(capsys)
    assert main(["train", "--out", str(killed), "--resume"]) == 0
    assert "starting from step 0" in capsys.readouterr().out
    assert metrics(killed) == metrics(whole)


def test_resume_may_go_on_for_longer(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=4) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "6"]) == 0
    assert [record["step"] for record in metrics(out) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "config.json").read_text())["training"]["steps"] == 6


def test_resume_refuses_another_configuration_or_other_data(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=3) == 0
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--lr", "0.5"]) == 2
    assert "lr is" in error_of(capsys)
    assert main(["train", "--out", str(out), "--resume", "--preset", "small"]) == 2
    assert "dim is 16, not 816" in error_of(capsys)
    before = (out / "config.json").read_bytes()
    assert main(["train", "--out", str(out), "--resume", "--steps", "2"]) == 2
    assert "has done 3 steps already: --steps must be at least that" in error_of(capsys)
    assert (out / "config.json").read_bytes() == before
    text.write_text(TEXT + "more")
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 2
    assert "has changed" in error_of(capsys)


def test_resume_publishes_the_checkpoint_that_a_kill_left_unpublished(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=6) == 0
    newest = (out / "checkpoints" / "step-000000006" / "model.safetensors").read_bytes()
    older = (out / "checkpoints" / "step-000000004" / "model.safetensors").read_bytes()
    assert newest != older
    (out / "model.safetensors").write_bytes(older)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == newest


def test_data_may_move_but_not_change(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, moved, other = tmp_path / "run", tmp_path / "moved.txt", tmp_path / "other.txt"
    assert train(text, out, steps=3) == 0
    text.rename(moved)
    other.write_text(TEXT + "more")
    capsys.readouterr()
    assert main(["train", str(other), "--out", str(out), "--resume", "--steps", "4"]) == 2
    assert "has changed" in error_of(capsys)
    assert main(["train", str(moved), "--out", str(out), "--resume", "--steps", "4"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 0
    assert metrics(out)[-2]["step"] == 5


def test_a_run_inside_its_own_data_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "run"
    assert train(tmp_path, out, steps=3) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "4"]) == 0


def test_data_that_changes_before_the_first_checkpoint_is_noticed(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(text, whole, steps=1) == 0
    out.mkdir()
    (out / "config.json").write_text((whole / "config.json").read_text())
    text.write_text(TEXT + "more")
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "has changed" in error_of(capsys)


def test_a_step_may_be_cut_anew_into_micro_batches(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = ["--carry-state", "--precision", "float64"]
    assert train(text, whole, *flags, steps=9) == 0
    shutil.copytree(whole, out)
    for step in (8, 9):
        shutil.rmtree(out / "checkpoints" / f"step-00000000{step}")
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--batch", "2"]) == 2
    assert "a step of this run has 4 windows: --batch times --accumulate must give 4" in error_of(capsys)
    shutil.copytree(whole / "checkpoints" / "step-000000008", out / "checkpoints" / "step-000000008")
    assert main(["train", "--out", str(out), "--resume", "--batch", "1", "--accumulate", "4"]) == 0
    expected, found = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.allclose(expected[name], found[name], rtol=0, atol=1e-12) for name in expected)


@pytest.mark.parametrize(
    ("place", "hint"), [("preparation.load_corpus", ""), ("loop.Trainer.run", "; continue with --resume")]
)
def test_an_interrupt_hints_at_resume_once_there_is_a_run(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    hint: str,
) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gateloop_transformer.training.{place}", interrupt)
    assert train(text, tmp_path / "run") == 1
    assert f"interrupted{hint}\n" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == bool(hint)


def test_carried_states_are_part_of_a_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(text, whole, *CARRIED, steps=6) == 0
    assert train(text, out, *CARRIED, steps=3) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "6"]) == 0
    # The schedule of three steps is another, so only the saved states' number and form can be compared.
    saved = [sorted(path.name for path in (run / "checkpoints" / "step-000000006").iterdir()) for run in (whole, out)]
    assert saved[0] == saved[1]
    assert "carried.safetensors" in saved[0]
    (out / "checkpoints" / "step-000000006" / "carried.safetensors").unlink()
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--steps", "9"]) == 0
    assert "carried.safetensors' is missing; going back to step" in capsys.readouterr().err


def test_one_command_starts_and_resumes(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(text, whole) == 0
    assert train(text, out, "--resume-or-start") == 0
    for step in (6, 8):
        shutil.rmtree(out / "checkpoints" / f"step-00000000{step}")
    (out / "model.safetensors").unlink()
    capsys.readouterr()
    assert train(text, out, "--resume-or-start") == 0
    assert "no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert metrics(out) == metrics(whole)
    assert train(text, out, "--resume-or-start", "--lr", "1e-3") == 2
    assert "has another configuration: lr is 0.006, not 0.001" in error_of(capsys)
