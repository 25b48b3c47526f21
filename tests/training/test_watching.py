"""What a run leaves to be looked at: metrics with shares of time, TensorBoard, and errors that say what was saved."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from halting import halted

from gateloop_transformer.cli import main
from gateloop_transformer.runs import checkpoint, folder
from gateloop_transformer.runs.config import RunConfig, TrainingConfig
from gateloop_transformer.training import loop, step, watching
from gateloop_transformer.training.optimizer import Average
from gateloop_transformer.training.signals import Signals
from gateloop_transformer.training.watching import Clock

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(400))
TINY = [
    *(
        "--dim",
        "16",
        "--depth",
        "1",
        "--gate-loop-heads",
        "4",
        "--context",
        "32",
        "--batch",
        "4",
        "--sample-bytes",
        "0",
    ),
    *("--eval-bytes", "256", "--eval-every", "4", "--checkpoint-every", "2"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


def train(text: Path, out: Path, *flags: str) -> int:
    return main(["train", str(text), "--out", str(out), *TINY, *flags])


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_metrics_say_speed_memory_and_where_the_time_went(text: Path, tmp_path: Path) -> None:
    assert train(text, tmp_path / "run", "--steps", "3", "--track", "none") == 0
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    for record in steps:
        assert record["tokens_per_second"] > 0
        assert record["memory"] > 50e6
        assert set(record["shares"]) == {"data", "forward", "backward", "optimizer", "communication"}
        assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert record["shares"]["backward"] > 0
    assert [record["seconds"] for record in steps] == sorted(record["seconds"] for record in steps)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_tensorboard_has_what_metrics_have(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    write, seen = checkpoint.write, []

    def look(*rest: Any) -> None:
        """A run that is killed later goes on from here, and logs nothing again."""
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        seen.append(events.Scalars("loss")[-1].step)
        write(*rest)

    monkeypatch.setattr(checkpoint, "write", look)
    assert train(text, out, "--steps", "4") == 0
    assert seen == [2, 4]
    assert main(["train", "--out", str(out), "--resume", "--steps", "6"]) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    expected = {record["step"]: record["loss"] for record in records(out) if "loss" in record}
    assert found == pytest.approx(expected)
    assert [event.step for event in events.Scalars("bits_per_byte")] == [4, 6]
    assert len(events.Scalars("shares/forward")) == 6
    before = set((out / "tensorboard").iterdir())
    assert train(text, out, "--steps", "1", "--overwrite") == 0
    assert not before & set((out / "tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert train(text, tmp_path / "run", "--track", "wandb") == 2
    assert "--track wandb: wandb is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_service_is_told_of_the_run_and_of_each_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def log(values: dict[str, float], step: int) -> None:
        told.append((step, values))

    def init(project: str, name: str, config: dict[str, Any], dir: str) -> Any:
        told.append((project, name, config["dim"], config["steps"], dir))
        return SimpleNamespace(log=log, finish=lambda: told.append("finished"))

    module = ModuleType("wandb")
    module.__spec__, module.init = ModuleSpec("wandb", None), init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    out = tmp_path / "run"
    assert train(text, out, "--steps", "2", "--track", "wandb") == 0
    assert told[0] == ("gateloop", "run", 16, 2, str(out))
    losses = [(step, values["loss"]) for step, values in told[1:-1] if "loss" in values]
    assert losses == [(record["step"], record["loss"]) for record in records(out) if "loss" in record]
    assert told[-1] == "finished"


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The loss of these steps is not a number."""
    draw = step.draw
    original = step.Stepper._objective

    def objective(self: Any, ids: Any, resets: Any, state: Any) -> Any:
        found = original(self, ids, resets, state)
        if self.now in steps:
            found = found._replace(total=found.total * torch.nan, nats=found.nats * torch.nan)
        return found

    def remember(tokens: Any, options: Any, engine: Any, number: int, micro: int) -> Any:
        step.Stepper.now = number  # type: ignore[attr-defined]
        return draw(tokens, options, engine, number, micro)

    monkeypatch.setattr(step, "draw", remember)
    monkeypatch.setattr(step.Stepper, "_objective", objective)


def test_batches_that_are_not_finite_are_passed_over_and_counted(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 5)
    out = tmp_path / "run"
    assert train(text, out, "--steps", "6", "--skip-nonfinite", "2", "--carry-state") == 0
    assert [record["skipped"] for record in records(out) if "skipped" in record] == [1, 2]
    assert [record["step"] for record in records(out) if "loss" in record] == [1, 3, 4, 6]
    progress = json.loads((out / "checkpoints" / "step-000000006" / "progress.json").read_text())
    assert progress["skipped"] == 2
    capsys.readouterr()
    assert train(text, tmp_path / "other", "--steps", "6", "--skip-nonfinite", "1") == 1
    said = capsys.readouterr().err
    assert "the loss is not finite at step 5 (after 1 that --skip-nonfinite let pass)" in said
    assert "the checkpoint of step 4 is kept" in said


@pytest.mark.parametrize(("method", "step"), [("__init__", None), ("log", 2)])
def test_a_tracker_that_fails_costs_no_checkpoint(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    step: int | None,
) -> None:
    original = getattr(watching.TensorBoard, method)

    def fail(self: Any, *rest: Any, **options: Any) -> None:
        if options.get("step") in (None, 3):
            raise LookupError("no such project")
        original(self, *rest, **options)

    monkeypatch.setattr(watching.TensorBoard, method, fail)
    assert train(text, tmp_path / "run", "--steps", "6") == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "the tracker tensorboard failed: " in said
    assert "no such project" in said
    assert folder.newest_step(tmp_path / "run") == step


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_full_disk_is_said_with_what_was_saved(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if what == "checkpoint":
        original = checkpoint.write_tensors

        def write(path: Path, *rest: Any) -> None:
            if "step-000000004" in str(path):
                raise full
            original(path, *rest)

        monkeypatch.setattr(checkpoint, "write_tensors", write)
    else:
        log = loop.Log.write

        def note(self: Any, record: dict[str, Any]) -> None:
            if record["step"] == 3:
                self.file.close()
                self.file = Path("/dev/full").open("w")  # noqa: SIM115
            log(self, record)

        monkeypatch.setattr(loop.Log, "write", note)
    out = tmp_path / "run"
    assert train(text, out, "--steps", "6") == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert f"{os.strerror(errno.ENOSPC)}; the checkpoint of step 2 is kept. Continue with --resume" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000002"]
    monkeypatch.undo()
    assert main(["train", "--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_the_step_it_finds(text: Path, tmp_path: Path, number: signal.Signals) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = ["--steps", "9", "--checkpoint-every", "1000", "--eval-every", "1000", "--track", "none"]
    process = halted(5, out, str(text), *TINY, *flags)
    process.send_signal(number)
    done = processes.finish(process)
    assert done.returncode == 1
    (saved,) = (out / "checkpoints").iterdir()
    last = int(saved.name.removeprefix("step-"))
    assert last < 9
    assert f"interrupted; {number.name}: step {last} is saved; continue with --resume" in done.stderr
    assert records(out)[-1]["step"] == last
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert train(text, whole, *flags) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_signal_that_a_launcher_repeats_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        now += 0.1
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGINT"
        now += 1
        with pytest.raises(KeyboardInterrupt, match="at once"):
            signal.raise_signal(signal.SIGINT)


def test_processes_agree_on_the_minutes_that_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(main=False, sum=lambda values: [values[0] + 7.0])
    config = RunConfig(training=TrainingConfig(minutes=1.0))
    progress = checkpoint.Progress(seconds=3.0)
    trainer: Any = SimpleNamespace(config=config, engine=engine, progress=progress, started=progress)
    assert loop.Trainer._time(trainer, Clock(torch.device("cpu"))) == 7.0


def test_minutes_count_from_the_end_of_the_first_step_of_a_process(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, first = 0.0, True

    def gradients(self: Any, *arguments: Any) -> Any:
        nonlocal now, first
        now, first = now + (1000.0 if first else 1.0), False
        return step_of(self, *arguments)

    step_of = step.Stepper.gradients
    monkeypatch.setattr(step.Stepper, "gradients", gradients)
    monkeypatch.setattr(watching, "time", SimpleNamespace(perf_counter=lambda: now))
    out = tmp_path / "run"
    assert train(text, out, "--minutes", str(2.5 / 60)) == 0
    assert [record["seconds"] for record in records(out) if "loss" in record] == [0, 1, 2, 3]
    # Another process compiles, or reads what was compiled, once more.
    first = True
    assert main(["train", "--out", str(out), "--resume", "--minutes", str(4.5 / 60)]) == 0
    assert [record["seconds"] for record in records(out) if "loss" in record] == [0, 1, 2, 3, 3, 4, 5]


def test_the_main_process_speaks_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda _seconds: waited.append(capsys.readouterr().err))
    monkeypatch.setenv("LOCAL_RANK", "1")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main(["train", "--lr", "x"])
        assert main(["train", "--out", "x", "--lr", "-1"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 2 - int(rank)
    assert [text.count("invalid float") for text in waited] == [0, 1]


def test_several_processes_are_not_given_one_device(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for device in ("nowhere", "meta", "cpu:0"):
        assert train(text, tmp_path / "run", "--device", device) == 2
        assert repr(device) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_average_of_the_weights_is_what_its_definition_says() -> None:
    model = torch.nn.Linear(2, 2)
    average, kept = Average(model, 0.9), []
    for number in range(1, 6):
        with torch.no_grad():
            model.weight.add_(number)
        kept.append(model.weight.detach().clone())
        average.update(model, number)
    shares = torch.tensor([0.9 ** (5 - number) for number in range(1, 6)])
    expected = sum(share * weight for share, weight in zip(shares / shares.sum(), kept, strict=True))
    torch.testing.assert_close(average.weights["weight"], expected)
    now = model.weight.detach().clone()
    with average.applied(model):
        torch.testing.assert_close(model.weight, expected)
    assert torch.equal(model.weight, now)


def test_the_average_is_published_and_validated(text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "run"
    assert train(text, out, "--steps", "4", "--ema", "0.5") == 0
    last = out / "checkpoints" / "step-000000004"
    published, averaged, weights = (
        load_file(path)
        for path in (out / "model.safetensors", last / "average.safetensors", last / "model.safetensors")
    )
    for name, tensor in averaged.items():
        assert torch.equal(published[name], tensor)
    assert any(not torch.equal(published[name], tensor) for name, tensor in weights.items())
