"""Runs of a few steps of a tiny model from the command line, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateloop_transformer.cli import main
from gateloop_transformer.files import digest
from gateloop_transformer.runs import checkpoint

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
    (path / "checksums.json").write_text(json.dumps({file.name: digest(file) for file in names}))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err
