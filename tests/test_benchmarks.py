"""The scripts of benchmarks/: which runs are started, and what is kept of those that end."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gateloop_transformer.ops.backends import jax_xla
from gateloop_transformer.ops.dispatch import TABLE

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what stands in their folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(path).stem}", BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rate_at_which_a_run_diverged_is_not_the_best() -> None:
    plan, results = load("language/plan.py"), load("results.py")
    group = plan.GROUPS["shakespeare"]
    forms = group["sizes"]["lstm"]
    base = {**group["settings"], "model": "lstm", "seed": 0}
    losses = (math.nan, 2.0, 1.5)
    rows = [
        {**base, "options": form, "lr": lr, "val_loss": loss + (form != forms[1])}
        for form in forms
        for lr, loss in zip(plan.RATES["lstm"], losses, strict=True)
    ]
    best = plan.RATES["lstm"][2]
    left = plan.missing(group, rows, ["lstm"])
    decays = [(forms[1], best, decay) for decay in plan.OTHER_DECAYS["lstm"]]
    assert [(spec["options"], spec["lr"], spec["weight_decay"]) for spec in left] == decays
    more = [{**spec, "val_loss": loss} for spec, loss in zip(left, (1.25, 1.75), strict=True)]
    left = plan.missing(group, rows + more, ["lstm"])
    seeds = [(forms[1], best, plan.OTHER_DECAYS["lstm"][0], n) for n in group["seeds"]]
    assert [(spec["options"], spec["lr"], spec["weight_decay"], spec["seed"]) for spec in left] == seeds
    assert {row["lr"] for row in results.best_rate(rows)} == {best}
    assert results.best_rate(rows + more) == more[:1]
    shorter = [{**row, "steps": 10} for row in rows]
    assert len(plan.missing(group, shorter, ["lstm"])) == 3 * len(forms)


def test_a_run_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load("language/plan.py")

    def execute(spec: dict[str, Any], python: str) -> dict[str, Any]:
        if spec["lr"] == plan.RATES["gru"][0]:
            raise RuntimeError("gru failed")
        return {**spec, "val_loss": 1.0}

    monkeypatch.setattr(plan, "execute", execute)
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan.py", "shakespeare", "--data", "x", "--peers", "y", "--models", "gru"])
    with pytest.raises(RuntimeError, match="gru failed"):
        plan.main()
    rows = json.loads((tmp_path / "shakespeare.json").read_text())["rows"]
    forms = plan.GROUPS["shakespeare"]["sizes"]["gru"]
    assert [row["lr"] for row in rows] == sorted(plan.RATES["gru"][1:] * len(forms))
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(forms)


def test_the_page_of_backends_is_what_their_table_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = load("backends.py")
    committed = (ROOT / "docs" / "results" / "backends.md").read_text()
    assert backends.page() == committed, "run `make results`"
    monkeypatch.setattr(jax_xla, "installed", lambda: False)
    assert backends.page() == committed
    assert all(f"| `{name}` |" in committed for name in TABLE)


def test_a_task_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = load("tasks.py")

    def execute(name: str, kind: str, seed: int) -> dict[str, Any]:
        if kind == tasks.TRACKING[0]:
            raise RuntimeError("parity failed")
        return {"name": name, "kind": kind, "seed": seed, "accuracy_by_length": {}}

    monkeypatch.setattr(tasks, "execute", execute)
    monkeypatch.setattr(tasks, "PATH", tmp_path / "tasks.json")
    monkeypatch.setattr(sys, "argv", ["tasks.py", "parity", "--seeds", "1"])
    with pytest.raises(RuntimeError, match="parity failed"):
        tasks.main()
    rows = json.loads((tmp_path / "tasks.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == tasks.TRACKING[1:]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_pages_and_figures_are_made_of_the_rows_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = load("results.py")
    machine = {"processor": "one", "cores": 1}
    # The better learning rate has the seeds; a run that diverged is not drawn.
    row = {
        "data": "text",
        "data_sha256": "0" * 64,
        "commit": "1",
        "machine": machine,
        "options": {},
        "parameters": 9,
        "weight_decay": 0.1,
    }
    row |= dict.fromkeys(("tokens", "seconds", "tokens_per_second", "memory_mib", "decoding_tokens_per_second"), 1.0)
    position = [{"from": 0, "to": 63, "loss": 1.5}]
    rows = [
        {**row, "model": "gru", "lr": lr, "seed": seed, "val_loss": loss, "bits_per_byte": loss / math.log(2), **more}
        for lr, seed, loss, more in (
            (1e-3, 0, 1.25, {"by_window": {"64": 1.5, "256": 1.25}, "by_position": position}),
            (1e-3, 1, 1.5, {"by_window": {"64": 1.75, "256": 1.75}, "by_position": position}),
            (2e-3, 0, math.nan, {}),
        )
    ]
    file = json.dumps({"command": "plan.py books", "processes_at_a_time": 1, "rows": rows})
    (tmp_path / "books.json").write_text(file)
    task = {
        "task": "copying",
        "accuracy_by_length": {"8": 1.0, "16": 0.5},
        "accuracy_by_span": {"4-7": 1.0, "8-15": 0.25},
    }
    task |= {"chance": 0.125, "trained_lengths": [8, 8], "seconds": 1.0, "machine": machine, "commit": "1"}
    found = [
        {**task, "name": "selective copying", "kind": kind, "seed": 0, "command": f"gateloop tasks copying # {kind}"}
        for kind in ("ring (complex)", "fixed gates (LRU)")
    ]
    (tmp_path / "tasks.json").write_text(json.dumps({"rows": found}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.main()
    language, tasks = (tmp_path / "language.md").read_text(), (tmp_path / "tasks.md").read_text()
    assert "| nn.GRU | 9 | 0.001 | 0.1 | 2 | 1.375 ± 0.177 |" in language
    assert "| nn.GRU | 0, 1 | 2.344 ± 0.255 | 2.164 ± 0.510 |" in language
    assert "| model | seeds | 0–63 |\n|---|---|---|\n| nn.GRU | 0, 1 | 2.164 ± 0.000 |" in language
    assert "| fixed gates (LRU) | 100.0% | 25.0% |" in tasks
    for name in ("language.png", "context.png", "tasks.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert f"]({name})" in language + tasks


def test_every_model_has_a_color_of_its_own_at_any_depth() -> None:
    figures, names = load("figures.py"), load("results.py").NAMES.values()
    colors = [figures.color_of(name) for name in names]
    assert "tab:gray" not in colors
    assert len(set(colors)) == len(colors)
    assert [figures.color_of(f"{name}, 3 layers") for name in names] == colors


def test_the_benchmark_for_gpus_runs_all_its_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = load("gpu.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no GPU that torch can use" in capsys.readouterr().err
    # As on a GPU, in the interpreter.
    for name, value in {
        "DEVICE": "cpu",
        "RESULTS": tmp_path,
        "SHAPES": ((1, 5, 4),),
        "HEADS": ((1, 5, 2, 4),),
        "ROUNDS": 1,
        "bandwidth": lambda: 1e9,
        "milliseconds": lambda function: (function(), 1.0)[1],
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    assert gpu.main() == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["library"] for row in rows} >= {"gateloop", "gateloop, complex gates", "attention (torch)"}
    assert (tmp_path / "gpu.md").read_text().startswith("# On a GPU: a device")


def test_the_roofline_is_that_of_the_kernels_blocks() -> None:
    page = load("gpu_roofline.py").page()
    assert page == (BENCHMARKS.parent / "docs" / "results" / "gpu-roofline.md").read_text()


def test_the_page_of_jax_is_made_of_its_figures() -> None:
    results = ROOT / "docs" / "results"
    page = load("jax_scan.py").page(json.loads((results / "jax.json").read_text()))
    assert (results / "jax.md").read_text() == page
