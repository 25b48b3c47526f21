"""Runs from the command line: train, resume, generate, evaluate, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from halting import halted
from safetensors.torch import load_file, save_file

from gateloop_transformer import Transformer, quantize
from gateloop_transformer.cli import main
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.data.batches import stream_at
from gateloop_transformer.data.corpus import load_corpus
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.training import checkpoint, folder, storage
from gateloop_transformer.training.config import FORMAT, PRESETS, RunConfig, TrainingConfig, resolve
from gateloop_transformer.training.evaluation import score, validate
from gateloop_transformer.training.folder import load_model
from gateloop_transformer.training.optimizer import parameter_groups
from gateloop_transformer.training.schedule import learning_rate

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(400))
TINY = [
    *("--dim", "16", "--depth", "2", "--gate-loop-heads", "4", "--context", "32", "--batch", "4"),
    *("--eval-bytes", "256", "--sample-bytes", "8", "--eval-every", "4", "--checkpoint-every", "3"),
]

# A mixed model whose windows follow each other, in two micro-batches.
CARRIED = [
    *("--carry-state", "--accumulate", "2", "--conv-size", "4"),
    *("--layer-pattern", "gate attention", "--dim-head", "8", "--heads", "2", "--rotary-emb", "--attn-window", "9"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; tests that change it copy it."""
    place = tmp_path_factory.mktemp("finished")
    (place / "data.txt").write_text(TEXT)
    assert train(place / "data.txt", place / "run", steps=1) == 0
    return place / "run"


def train(text: Path | None, out: Path, *flags: str, steps: int | None = 8) -> int:
    data = [] if text is None else [str(text)]
    length = [] if steps is None else ["--steps", str(steps)]
    return main(["train", *data, "--out", str(out), *TINY, *length, *flags])


def metrics(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for changing in ("seconds", "tokens_per_second", "memory", "shares"):
            record.pop(changing, None)
    return records


def steps_of(out: Path) -> list[int]:
    """The steps of the checkpoints, all of which are whole."""
    paths = sorted((out / "checkpoints").iterdir())
    for path in paths:
        checkpoint.verify(path)
    return [int(path.name.removeprefix("step-")) for path in paths]


def seal(path: Path) -> None:
    """A checkpoint's checksums fit what is in it now."""
    names = [file for file in sorted(path.iterdir()) if file.name != "checksums.json"]
    (path / "checksums.json").write_text(json.dumps({file.name: storage.digest(file) for file in names}))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--dim N", "default: the preset's; tiny: 208"),
        ("--lr X", "default: the preset's; tiny: 0.006"),
        ("--dropout X", "default: the preset's; tiny: 0.0"),
        ("--clip X", "default: 1.0"),
    ],
)
def test_help_says_which_defaults_are_the_presets(capsys: pytest.CaptureFixture[str], flag: str, default: str) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    of_flag = text[text.rindex(f" {flag} ") + len(flag) + 2 :].split(" --")[0]
    assert of_flag.endswith(f"({default})")


def test_progress_is_said_with_the_end_in_sight(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, tmp_path / "run", steps=4) == 0
    assert "\nstep 4/4: " in capsys.readouterr().out
    assert train(text, tmp_path / "other", "--eval-every", "1", "--minutes", "0.001", steps=None) == 0
    assert "\nstep 1: " in capsys.readouterr().out


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


def test_resume_may_go_on_for_longer(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=4) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "6"]) == 0
    assert [record["step"] for record in metrics(out) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "config.json").read_text())["training"]["steps"] == 6


def test_minutes_end_a_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("gateloop_transformer.training.watching.Clock.elapsed", lambda _clock: 0.5)
    assert main(["train", str(text), "--out", str(out), *TINY, "--minutes", "0.02"]) == 0
    # The first step, in which kernels are compiled, does not count.
    assert metrics(out)[-1]["step"] == 4
    assert train(text, tmp_path / "both", "--minutes", "1") == 2


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


def test_loss_falls(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--lr", "1e-2", "--eval-every", "60", "--checkpoint-every", "60", steps=60) == 0
    losses = [record["loss"] for record in metrics(out) if "loss" in record]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "-1"], "--lr must be finite and above 0"),
        (["--lr", "inf"], "--lr must be finite and above 0"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--lr", "fast"], "invalid float"),
        (["--gate", "square"], "invalid choice"),
        (["--preset", "huge"], "invalid choice"),
        (["--gate-loop-heads", "3"], "must divide"),
        (["--seed", "-1"], "--seed must be in [0, 2**64)"),
        (["--beta2", "1"], "--beta2 must be in [0, 1), not 1.0"),
        (["--dim", "0"], "not --dim=0"),
        (["--fixed-gates", "--gate", "polar"], "--fixed-gates needs gate 'ring'"),
        (["--seed", str(2**64)], "seed must be in [0, 2**64)"),
        (["--batch", "99999999999999"], "do not fit into memory"),
        (["--batch", "1" + 26 * "0"], "do not fit into memory"),
        (["--ff-mult", "1" + 26 * "0"], "does not fit into memory"),
        (["--ff-mult", "1" + 15 * "0"], "does not fit into memory"),
        (["--conv-size", "1" + 26 * "0"], "does not fit into memory"),
        (["--layer-pattern", "gate window"], "--layer-pattern must be words"),
        (["--dropout", "1"], "dropout"),
        (["--device", "abacus"], "device 'abacus' cannot be used here; this machine has cpu"),
        (["--context", "100000"], "too short"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--resume"], "holds no run"),
        (["--frobnicate"], "unrecognized"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "run"
    if flags == ["--resume"]:
        out.mkdir()
    base = [] if flags == ["--resume"] else TINY
    try:
        code: Any = main(["train", str(text), "--out", str(out), *base, *flags])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in error_of(capsys)
    assert not (out / "config.json").exists()


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


def test_a_loss_that_is_not_finite_stops_with_step_and_layer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--lr", "1e30", "--warmup", "0") == 1
    error = capsys.readouterr().err
    assert "not finite at step" in error
    assert "layers.0" in error or "token_emb" in error
    assert "checkpoint" in error


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


def test_resume_publishes_the_checkpoint_that_a_kill_left_unpublished(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=6) == 0
    newest = (out / "checkpoints" / "step-000000006" / "model.safetensors").read_bytes()
    older = (out / "checkpoints" / "step-000000004" / "model.safetensors").read_bytes()
    assert newest != older
    (out / "model.safetensors").write_bytes(older)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == newest


def test_weights_that_are_not_finite_are_never_saved(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--lr", "1e38", "--warmup", "0", steps=1) == 1
    assert "not finite after step 1: first in" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


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


@pytest.mark.parametrize("how", ["lacks an entry", "is empty"])
def test_optimizer_state_with_missing_parts_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "run"
    assert train(text, out, steps=3) == 0
    path = out / "checkpoints" / "step-000000003" / "optimizer.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]) if how == "lacks an entry" else {}, path)
    seal(path.parent)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 2
    assert "optimizer state" in error_of(capsys)


def test_everyone_may_read_a_model_whom_the_umask_lets(text: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert train(text, tmp_path / "run", steps=1) == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_one_file_is_not_called_files(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "run", tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("")
    assert train(folder, out, steps=1) == 0
    said = capsys.readouterr().out
    assert ": 1 file, the end held out" in said
    assert "(1 binary or empty file left out)" in said
    assert "after 1 step, " in said
    assert main(["eval", str(out), str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(" bytes in 1 file\n")
    assert captured.err == "gateloop eval: 1 empty file left out\n"


def test_eval_reads_any_bytes(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out, steps=1) == 0
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 2)
    capsys.readouterr()
    assert main(["eval", str(out), str(tmp_path / "binary"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 512


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


@pytest.mark.parametrize("command", [["generate", "", "--prompt", "a"], ["eval", "", "data"], ["train", "--out", ""]])
def test_an_empty_folder_name_is_not_the_current_folder(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 2
    assert "expected a folder, not an empty string" in error_of(capsys)


def test_evaluation_carries_state_whatever_the_block() -> None:
    torch.manual_seed(0)
    model = Transformer(16, num_tokens=256, depth=2, gate_loop_heads=4, conv_size=3).double()
    data = np.frombuffer(TEXT[:500].encode(), dtype=np.uint8)
    ids = torch.from_numpy(data.astype(np.int64))[None]
    expected = model(ids, return_loss=True).item() / np.log(2)
    for block in (1, 7, 100, 499, 500, 5000):
        assert score(model, [data], ByteTokenizer(), block).bits_per_byte == pytest.approx(expected, rel=1e-10)
    assert validate(model, Tokens.of(data), 499, 10**6, 4) == pytest.approx(expected, rel=1e-6)


def test_every_parameter_is_in_one_group_and_gates_in_their_own() -> None:
    model = Transformer(**resolve("tiny", {"layer_pattern": "gate attention"}, None).model.arguments())
    groups = parameter_groups(model, TrainingConfig(gate_lr=0.25))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gates = {names[id(parameter)] for parameter in groups[-1]["params"]}
    assert gates == {name for name in names.values() if ".to_a." in name or ".ring_" in name}
    assert groups[-1]["weight_decay"] == 0
    assert groups[-1]["factor"] == 0.25


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


def test_the_learning_rate_rises_then_falls() -> None:
    config = TrainingConfig(lr=1.0, min_lr=0.1, warmup=0.1)
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.55)
    assert learning_rate(config, 1.0) == pytest.approx(0.1)
    assert learning_rate(config, 1.3) == pytest.approx(0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_configuration_file(preset: str) -> None:
    config = resolve(preset, {}, None)
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json())), "config.json") == config


def test_what_a_preset_has_follows_what_is_given() -> None:
    assert resolve("tiny", {}, None).model.max_memory == 64
    assert resolve("tiny", {"context": 1024}, None).model.max_memory == 256
    assert resolve("base", {"context": 4096}, None).model.max_memory == 4096
    assert resolve("tiny", {"context": 2}, None).model.max_memory == 2
    assert resolve("tiny", {"context": 1024, "max_memory": 9}, None).model.max_memory == 9
    assert resolve("tiny", {}, None).model.gate_rank == 16
    assert resolve("tiny", {"dim": 512}, None).model.gate_rank == 32
    assert resolve("tiny", {"dim": 512, "gate_rank": 3}, None).model.gate_rank == 3
    for few in ({"dim": 16}, {"fixed_gates": True}, {"gate_loop_heads": 8}):
        assert resolve("tiny", few, None).model.gate_rank is None
    assert resolve("paper", {"context": 1024}, None).model.max_memory == TransformerConfig().max_memory


def test_the_configuration_has_every_argument_of_the_model() -> None:
    import inspect

    arguments = set(inspect.signature(Transformer).parameters)
    assert set(TransformerConfig().arguments()) == arguments - {"checkpoint_gate_looped_attn", "backend"}
    defaults = Transformer(**TransformerConfig(depth=1, dim=8).arguments())
    assert isinstance(defaults, Transformer)


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


def test_a_carried_state_is_what_reading_from_the_start_gives(text: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, a step's loss is that of one long text cut into windows."""
    out = tmp_path / "run"
    assert train(text, out, "--carry-state", "--batch", "1", "--lr", "1e-30", "--weight-decay", "0", steps=5) == 0
    model = load_model(out)
    corpus = load_corpus(str(text), valid_fraction=0.1, context=32, tokenizer=ByteTokenizer())
    windows = [stream_at(corpus.train, step, windows=1, context=32, seed=0).ids for step in range(1, 6)]
    ids = torch.cat([windows[0], *(window[:, 1:] for window in windows[1:])], 1)
    logits = model(ids[:, :-1])
    losses = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").view(5, 32).mean(1)
    found = [record["loss"] for record in metrics(out) if "loss" in record]
    assert found == pytest.approx(losses.tolist(), rel=1e-5)


def test_attention_without_a_window_carries_no_state(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--carry-state", "--layer-pattern", "gate attention") == 2
    assert "--carry-state with attention layers needs an attn_window" in error_of(capsys)


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


def test_a_run_is_not_put_among_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    assert train(tmp_path, tmp_path) == 2
    assert "is the folder of the data; choose another for the run" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
