"""Sweeps: grids, names, runs in turn, what is skipped, what fails, what stops them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import processes
import pytest

from gateloop_transformer.cli import main
from gateloop_transformer.training import sweep
from gateloop_transformer.training.sweep import Sweep, name_of, parse_grid, ranked, table

TINY = [
    *("--dim", "16", "--depth", "1", "--gate-loop-heads", "4", "--batch", "4", "--steps", "2"),
    *("--eval-bytes", "64", "--sample-bytes", "0"),
]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    ("texts", "seeds", "expected"),
    [
        (["lr=1e-3,1"], None, {"lr": [1e-3, 1]}),
        (["gate-loop-heads=4,8", "carry_state=true,False"], "2", {"gate_loop_heads": [4, 8], "carry_state": [1, 0]}),
        (["attn_softmax_normalize=true", "schedule=wsd, cosine"], None, None),
    ],
)
def test_grids_are_read_by_the_types_of_their_fields(
    texts: list[str], seeds: str | None, expected: dict[str, Any] | None
) -> None:
    grid = parse_grid(texts, seeds)
    if expected is None:
        assert grid == {"attn_softmax_normalize": [True], "schedule": ["wsd", "cosine"]}
    else:
        assert grid == {**expected, **({} if seeds is None else {"seed": [2]})}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "a sweep needs a --grid or --seeds"),
        (["--grid", "foo=1"], "--grid foo=1: there is no setting 'foo'; 'gateloop sweep --help-all' "),
        (["--grid", "contxt=1"], "there is no setting 'contxt'; did you mean 'context'?"),
        (["absent.txt", "--grid", "lr=1"], "no file, folder or glob match"),
        (["--grid", "lr"], "--grid lr: no values; it takes NAME=VALUE"),
        (["--grid", "lr="], "--grid lr=: no values; it takes NAME=VALUE"),
        (["--grid", "lr=1,fast"], "--grid lr=1,fast: expected a number, not 'fast'"),
        (["--grid", "batch=1.5"], "--grid batch=1.5: expected a whole number, not '1.5'"),
        (["--grid", "schedule=linear"], "expected cosine, wsd, constant, not 'linear'"),
        (["--grid", "carry_state=2"], "expected true or false, not '2'"),
        (["--grid", "lr=1,1.0"], "a value is given twice"),
        (["--grid", "seed=1", "--seeds", "2"], "--seeds: 'seed' is given twice"),
        (["--seeds", "x"], "--seeds: expected a whole number, not 'x'"),
        (["--seeds", ""], "--seeds: no values; it takes N,N,..."),
        (["--grid", "lr=1", "--lr", "2"], "lr is both in the grid and a flag"),
        (["--grid", "lr=1,-1"], "lr=-1.0: lr must be finite and above 0"),
        (["--grid", "gate_loop_heads=8,7"], "gate_loop_heads=7: GateLoopedAttention: "),
    ],
)
def test_what_makes_no_sense_is_one_line_before_anything_starts(
    flags: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--out", str(tmp_path / "s"), *flags]) == 2
    assert problem in error_of(capsys)
    assert not (tmp_path / "s").exists()


def test_runs_are_done_once_and_failures_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "s"
    text.write_text("one two three four. " * 100)
    command = ["sweep", str(text), "--out", str(out), "--grid", "lr=1e-3", "--grid", "context=32,99999", *TINY]
    assert main([*command, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"1/2 lr=0.001,context=32: training, see {out / 'lr=0.001,context=32.log'}\n")
    assert "gateloop sweep: failed: 1 of 2 runs failed: lr=0.001,context=99999" in captured.err
    rows = json.loads(captured.out)["rows"]
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert (rows[0]["settings"], rows[0]["steps"]) == ({"lr": 0.001, "context": 32}, 2)
    assert "too short" in rows[1]["error"]
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    assert "parameters on" in (out / "lr=0.001,context=32.log").read_text()
    for name in ("curves.png", "lr.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    again: list[Any] = []

    def run_one(_plan: Sweep, values: dict[str, Any]) -> sweep.Row:
        again.append(values)
        return rows[1]

    monkeypatch.setattr(sweep, "_run_one", run_one)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert f"1/2 lr=0.001,context=32: {rows[0]['bits_per_byte']:.4f} bits per byte" in said
    assert "s, as before" in said
    assert again == [rows[1]["settings"]]
    assert main([*command, "--clip", "2"]) == 2
    assert "holds a sweep with other settings" in error_of(capsys)
    for harm in (None, [None], [{"name": "a"}], [{**rows[0], "bits_per_byte": None}], "[" * 100_000):
        (out / "results.json").write_text(harm if isinstance(harm, str) else json.dumps({"rows": harm}))
        assert main(command) == 2
        assert "results.json' is " in error_of(capsys)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    assert main(["sweep", "--out", str(tmp_path), "--seeds", "1,2"]) == 2
    assert "is not empty and holds no sweep" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_commands_say_all_settings_and_resume_what_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"preset": "small", "carry_state": True, "use_gate_looped_attn": False}
    settings |= {"layer_pattern": "gate attention", "attn_window": 64, "word": "of the command line alone"}
    (tmp_path / "book.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    plan = Sweep(tmp_path / "s", "book.txt", settings, {"attn_softmax_normalize": [True], "seed": [1, 2]})
    first, second = plan.combinations()
    folder = tmp_path / "s" / "attn_softmax_normalize=True,seed=2"
    assert folder.name == name_of(second)
    flags = ["--preset=small", "--carry-state", "--no-use-gate-looped-attn", "--layer-pattern=gate attention"]
    flags += ["--attn-window=64", "--word=of the command line alone"]
    flags += ["--attn-softmax-normalize=True", "--seed=2"]
    start = [sys.executable, "-m", "gateloop_transformer", "train", "--json", f"--out={folder}", "book.txt"]
    assert plan.command(second) == start + flags
    plan.check()
    with pytest.raises(ValueError, match=r"seed=1: .* attn_window"):
        Sweep(tmp_path, None, {**settings, "attn_window": None}, plan.grid).check()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert plan.command(second) == [*start, *flags, "--resume"]
    assert "--resume" not in plan.command(first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_run_at_work(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    code = (
        "import pathlib, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "    while True: signal.pause()\n"
        "except KeyboardInterrupt:\n"
        f"    pathlib.Path({str(stopped)!r}).touch()\n"
    )
    monkeypatch.setattr(Sweep, "command", lambda _self, _values: [sys.executable, "-c", code])
    monkeypatch.setattr(sweep, "_PATIENCE", processes.LIMIT)
    waits, communicate = threading.Event(), Popen.communicate

    def wait(child: Popen[bytes]) -> Any:
        waits.set()
        return communicate(child)

    monkeypatch.setattr(Popen, "communicate", wait)

    def interrupt() -> None:
        waits.wait(processes.LIMIT)
        processes.until(ready.exists)
        os.kill(os.getpid(), number)

    # Shells start what runs in the background with SIGINT ignored.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, outside))
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt)
        assert main(["sweep", "--out", str(tmp_path / "s"), "--seeds", "7,8"]) == 1
    assert stopped.exists()
    assert "interrupted; seed=7 was stopped; the same command continues the sweep" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "s" / "results.json").exists()


def test_a_run_that_is_killed_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(Sweep, "command", lambda _self, _values: [sys.executable, "-c", code])
    assert main(["sweep", "--out", str(tmp_path / "s"), "--seeds", "7"]) == 1
    assert "1/1 seed=7: failed: ended by signal 9 (see seed=7.log)" in capsys.readouterr().out


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gateloop_transformer.runs.folder import locked

    folder = tmp_path / "s"
    folder.mkdir(parents=True)
    with locked(folder):
        assert main(["sweep", "--out", str(folder), "--seeds", "1"]) == 2
    assert "another process" in error_of(capsys)


def test_the_best_comes_first_and_failures_last() -> None:
    rows: list[sweep.Row] = [
        {"name": "a", "status": "failed", "error": "x"},
        {"name": "b", "status": "finished", "bits_per_byte": 2.5, "steps": 1000, "seconds": 1.0},
        {"name": "c", "status": "finished", "bits_per_byte": 2.25, "steps": 1000, "seconds": 10.0},
    ]
    assert [row["name"] for row in ranked(rows)] == ["c", "b", "a"]
    assert table(rows).splitlines() == [
        "run  bits per byte  steps  seconds",
        "c           2.2500  1,000     10.0",
        "b           2.5000  1,000      1.0",
        "a           failed                ",
    ]
