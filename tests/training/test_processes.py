"""Runs of several processes give what one process gives, end when one is killed, and go on with another number."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from cases import needs
from safetensors.torch import load_file
from torch.distributed import HashStore

from gateloop_transformer.cli import main
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.training import engine

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(400))
# Everything that is kept between steps, in parts that processes cannot share evenly.
TINY = [
    *("--dim", "16", "--depth", "2", "--gate-loop-heads", "4", "--conv-size", "4", "--context", "32", "--batch", "5"),
    *("--layer-pattern", "gate attention", "--dim-head", "8", "--heads", "2", "--rotary-emb", "--attn-window", "9"),
    *("--accumulate", "2", "--carry-state", "--ema", "0.9", "--z-loss", "1e-3", "--precision", "float64"),
    *("--eval-bytes", "512", "--eval-every", "10", "--sample-bytes", "0", "--checkpoint-every", "10"),
    *("--steps", "20", "--track", "none"),
]
FSDP = needs("torch", "2.7", "FSDP2 runs on GPUs alone before")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
# Whatever configuration whoever runs the tests has for it.
ACCELERATE += ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--num_processes"]


def start(number: int, *flags: str, launcher: list[str] = TORCHRUN) -> Any:
    command = [*launcher, str(number), "-m", "gateloop_transformer", "train", *flags]
    return processes.start(command, stdout=PIPE, stderr=STDOUT)


def run(number: int, *flags: str, launcher: list[str] = TORCHRUN) -> str:
    """What a run of several processes said; it ended well."""
    done = processes.finish(start(number, *flags, launcher=launcher))
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", str(text), "--out", str(out), *TINY]) == 0
    return out


def distance(one: Path, other: Path) -> float:
    """The largest difference of anything that a run ends with."""
    found = 0.0
    step = Path("checkpoints", "step-000000020")
    files = [Path("model.safetensors"), *(path.relative_to(one) for path in (one / step).glob("*.safetensors"))]
    assert len(files) == 5
    for file in files:
        tensors, others = load_file(one / file), load_file(other / file)
        assert tensors.keys() == others.keys()
        parts = [(tensors[name] - others[name]).abs().flatten() for name in tensors]
        found = max(found, float(torch.cat(parts).max()))
    return found


def validations(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["bits_per_byte"] for record in records if "bits_per_byte" in record]


def rewind(out: Path) -> None:
    shutil.rmtree(out / "checkpoints" / "step-000000020")


@pytest.mark.parametrize(
    ("parallel", "others"),
    [
        pytest.param("ddp", [(3, "fsdp")], marks=FSDP),
        pytest.param("ddp", [(1, "ddp")], marks=pytest.mark.slow),
        pytest.param("fsdp", [(3, "ddp"), (2, "fsdp")], marks=[pytest.mark.slow, FSDP]),
    ],
)
def test_any_number_of_processes_trains_the_same_model(
    text: Path, tmp_path: Path, alone: Path, parallel: str, others: list[tuple[int, str]]
) -> None:
    out = tmp_path / "run"
    launcher = ACCELERATE if parallel == "ddp" else TORCHRUN
    said = run(2, str(text), "--out", str(out), *TINY, "--parallel", parallel, launcher=launcher)
    assert f"on 2 x cpu ({parallel})" in said
    assert said.count("validation:") == 1
    assert distance(alone, out) < 1e-10
    assert validations(out) == pytest.approx(validations(alone), rel=1e-10)
    for number, how in others:
        rewind(out)
        assert "resumed at step 10" in run(number, "--out", str(out), "--resume", "--parallel", how)
        assert distance(alone, out) < 1e-10


@pytest.mark.slow
@FSDP
def test_processes_may_share_each_window(text: Path, tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "run"
    said = run(3, str(text), "--out", str(out), *TINY, "--context-parallel", "3")
    assert "on 3 x cpu (ddp, 3 share each window)" in said
    assert distance(alone, out) < 1e-10
    rewind(out)
    # As many windows in a step, cut into micro-batches of another size.
    sizes = ["--batch", "10", "--accumulate", "1"]
    run(4, "--out", str(out), "--resume", "--context-parallel", "2", "--parallel", "fsdp", *sizes)
    assert distance(alone, out) < 1e-10


def test_fsdp_on_cpus_is_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    shared = SimpleNamespace(fsdp=True, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"--parallel fsdp on CPUs needs torch 2\.7 or newer, not 2\.6\.0\+cpu"):
        engine.Engine.check(shared, TrainingConfig())  # type: ignore[arg-type]


def test_a_wrong_share_is_refused_once(text: Path, tmp_path: Path) -> None:
    flags = [str(text), "--out", str(tmp_path / "run"), *TINY, "--batch", "1", "--accumulate", "1"]
    done = processes.finish(start(2, *flags))
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("gateloop train: error:")]
    assert len(errors) == 1
    assert "a step of 1 windows (--batch times --accumulate) cannot be shared by 2 processes" in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_second_run_of_a_process_reads_no_addresses_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = HashStore(), list[str]()

    def init(backend: str, **options: Any) -> None:
        assert (backend, options["rank"], options["world_size"]) == ("gloo", 1, 3)
        options["store"].set("address", str(len(keys)))
        keys.append(store.get(f"run-{len(keys)}/address").decode())

    monkeypatch.setattr(engine, "rendezvous", lambda *_rest, **_options: iter([(store, 1, 3)]))
    monkeypatch.setattr("torch.distributed.init_process_group", init)
    monkeypatch.setattr(engine, "_runs", itertools.count())
    for _ in range(3):
        engine._meet(torch.device("cpu"))
    assert keys == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MIXED_PRECISION", "bf16", "asks for the precision bf16, gateloop train for float32"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "accumulates 4 gradients, gateloop train 1"),
        ("USE_FSDP", "true", "--parallel fsdp too"),
        ("USE_DEEPSPEED", "true", "asks for deepspeed"),
        ("DYNAMO_BACKEND", "INDUCTOR", "asks for torch.compile"),
    ],
)
def test_what_accelerate_launch_is_asked_for_is_never_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with engine.Engine(TrainingConfig()) as alone:
        assert (alone.size, alone.device) == (1, torch.device("cpu"))
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=f"^accelerate launch .*{re.escape(said)}"):
        engine.Engine(TrainingConfig())


class TwoGpus:
    """What torch says on a machine with two."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.chosen: list[int] = []
        patch.setattr(engine, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        patch.setattr(torch.accelerator, "device_count", lambda: 2)
        patch.setattr(torch.accelerator, "set_device_index", self.chosen.append)


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = TwoGpus(monkeypatch)
    assert engine._device("auto") == torch.device("cuda")
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert engine._device("auto") == torch.device("cuda:1")
    assert engine._device("cpu") == torch.device("cpu")
    assert gpus.chosen == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"^3 processes of this machine cannot share 2 of its devices \(cuda\)"):
        engine._device("auto")
    with pytest.raises(ValueError, match=r"^4 processes cannot share the device 'cuda:0'"):
        engine._device("cuda:0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"^accelerate launch asks for CPUs: give gateloop train --device cpu too"):
        engine._device("auto")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_one_process_ends_so_does_the_run(text: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    process = start(2, str(text), "--out", str(out), *TINY, "--steps", "100000", "--checkpoint-every", "5")
    metrics = out / "metrics.jsonl"
    processes.until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 7, process)
    workers = [pid for pid, command in processes.running().items() if TORCHRUN[2] not in command]
    os.kill(max(workers), number)
    done = processes.finish(process)
    said = done.stdout
    assert done.returncode != 0
    if number == signal.SIGKILL:
        assert "lost contact with the others" in said
        assert "is kept. Start it again with --resume" in said
    last = max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*[0-9]"))
    assert main(["train", "--out", str(out), "--resume", "--steps", str(last + 1)]) == 0
    assert torch.isfinite(load_file(out / "model.safetensors")["token_emb.weight"]).all()
