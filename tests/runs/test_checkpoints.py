"""Checkpoints: whole or not there, damaged ones passed over, the best one kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_runs import error_of, metrics, seal, steps_of, train

from gateloop_transformer.cli import main
from gateloop_transformer.runs import checkpoint, folder


def test_a_model_without_checkpoints_is_not_trained_from_step_0(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=1) == 0
    shutil.rmtree(out / "checkpoints")
    model = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "no checkpoint to continue from" in error_of(capsys)
    assert (out / "model.safetensors").read_bytes() == model
    assert train(text, out, "--overwrite", steps=1) == 0


@pytest.mark.parametrize("how", ["lacks an entry", "is empty"])
def test_optimizer_state_with_missing_parts_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:

    out = tmp_path / "run"
    assert train(text, out, steps=3) == 0
    path = out / "checkpoints" / "step-000000003" / "optimizer.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]) if how == "lacks an entry" else {}, path)
    seal(path.parent)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 2
    assert "optimizer state" in error_of(capsys)


OTHER_FILES = ("optimizer.safetensors", "checksums.json")


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "progress.json", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_FILES)],
)
def test_a_damaged_checkpoint_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=3) == 0
    path = out / "checkpoints" / "step-000000003" / file
    path.write_bytes(path.read_bytes()[:-10])
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 2
    error = error_of(capsys)
    assert "damaged" in error
    assert "only checkpoint: start again with --overwrite" in error


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        pytest.param("progress.json", Path.unlink, marks=pytest.mark.slow),
        pytest.param(
            "model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-10]), marks=pytest.mark.slow
        ),
        pytest.param("optimizer.safetensors", flip, marks=pytest.mark.slow),
        ("checksums.json", flip),
    ],
)
def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, harm: Callable[[Path], Any]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(text, whole, steps=6) == 0
    shutil.copytree(whole, out)
    newest = out / "checkpoints" / "step-000000006"
    harm(newest / file)
    # Later than the checkpoint: to be forgotten, whatever it is.
    with (out / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 7, "\xff')
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    said = capsys.readouterr()
    assert f"warning: '{newest}" in said.err
    assert "going back to step-000000004" in said.err
    assert "resumed at step 4" in said.out
    assert metrics(out) == metrics(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "checkpoints" / "damaged-step-000000006").is_dir()
    assert main(["train", "--out", str(out), "--resume"]) == 0


def test_what_stands_in_the_place_of_checkpoints_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, own = tmp_path / "checkpoints", "step-000000006-copy2"
    (checkpoints / "step-000000006").mkdir(parents=True)
    (checkpoints / own).mkdir()
    for name in ("step-000000008", "damaged-step-000000008", "step-000000009.partial"):
        (checkpoints / name).write_text("no folder")
    assert folder.newest_step(tmp_path) == 8
    checkpoint.set_aside(tmp_path, 6)
    assert sorted(os.listdir(checkpoints)) == ["damaged-step-000000008", "step-000000006", own]
    (tmp_path / "config.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "remove", lambda _path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folder.clear_run(tmp_path)
    assert (tmp_path / "config.json").exists()
    folder.clear_run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", own]


def test_the_best_checkpoint_is_kept(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # After a step far too long nothing is as good as before.
    flags = ["--eval-every", "2", "--checkpoint-every", "1", "--keep", "1", "--warmup", "0", "--min-lr", "1"]
    assert train(text, out, *flags, "--lr", "1e-3", steps=2) == 0
    stored = json.loads((out / "config.json").read_text())
    stored["training"]["lr"] = 10.0
    (out / "config.json").write_text(json.dumps(stored))
    assert main(["train", "--out", str(out), "--resume", "--steps", "7"]) == 0
    assert steps_of(out) == [2, 7]
    assert checkpoint.best_checkpoint(out) == out / "checkpoints" / "step-000000002"


def test_weights_of_any_checkpoint_can_be_used(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--keep", "9", steps=6) == 0
    capsys.readouterr()

    def bits(which: str) -> float:
        assert main(["eval", str(out), str(text), "--json", "--checkpoint", which]) == 0
        return float(json.loads(capsys.readouterr().out)["bits_per_byte"])

    assert len({bits("3"), bits("4"), bits("6")}) == 3
    assert bits("last") == bits("6")
    best = min(("4", "6"), key=lambda step: checkpoint.score(out / "checkpoints" / f"step-00000000{step}"))
    assert bits("best") == bits(best)
    assert main(["generate", str(out), "--prompt", "1", "--tokens", "3", "--checkpoint", "5"]) == 2
    assert "has no checkpoint '5'; there are last, best, 3, 4, 6" in error_of(capsys)
