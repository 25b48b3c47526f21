"""A run killed forty times ends with the weights, bit for bit, of one never interrupted."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import processes
import pytest
import torch
from safetensors.torch import load_file

from gateloop_transformer.cli import main

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(400))
# A checkpoint after every step: about every second kill strikes while one is written.
FLAGS = [
    *("--dim", "64", "--depth", "2", "--gate-loop-heads", "4", "--context", "32", "--batch", "4", "--dropout", "0.1"),
    *("--eval-every", "50", "--eval-bytes", "256", "--sample-bytes", "8", "--checkpoint-every", "1", "--keep", "2"),
    *("--ema", "0.9", "--carry-state", "--steps", "400", "--track", "none"),
]


def wait_for_a_step(process: Popen[str], metrics: Path) -> None:
    def size() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    before = size()
    processes.until(lambda: process.poll() is not None or size() != before)


@pytest.mark.slow
def test_forty_kills_change_no_bit(tmp_path: Path) -> None:
    text, whole, killed = tmp_path / "data.txt", tmp_path / "whole", tmp_path / "killed"
    text.write_text(TEXT)
    assert main(["train", str(text), "--out", str(whole), *FLAGS]) == 0
    moments = random.Random(0)
    writing = 0
    for kill in range(40):
        how = ["--resume"] if (killed / "config.json").exists() else [str(text), *FLAGS]
        command = [sys.executable, "-m", "gateloop_transformer", "train", "--out", str(killed), *how]
        process = processes.start(command, stdout=DEVNULL, stderr=PIPE)
        # Most kills strike a run that trains; every tenth one that is still starting.
        if kill % 10:
            wait_for_a_step(process, killed / "metrics.jsonl")
        processes.pause(moments.uniform(0, 0.8 if kill % 10 else 4))
        process.kill()
        errors = processes.finish(process).stderr
        assert "error" not in errors, errors
        writing += any((killed / "checkpoints").glob("*.partial"))
    assert writing >= 3, "hardly a kill struck a checkpoint that was being written"
    assert main(["train", "--out", str(killed), "--resume"]) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    last = Path("checkpoints", "step-000000400")
    for file in (whole / last).glob("*.safetensors"):
        expected, found = load_file(file), load_file(killed / last / file.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), file.name
