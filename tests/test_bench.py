"""The benchmark: what it writes, and what it refuses. No figure is judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gateloop_transformer.bench import cases, report
from gateloop_transformer.bench.cases import Case
from gateloop_transformer.bench.peers import Peer, PeerFailed
from gateloop_transformer.bench.timing import interleaved
from gateloop_transformer.cli import main


def test_candidates_run_in_turn() -> None:
    order: list[str] = []

    def candidate(name: str, time: float) -> Any:
        def run() -> float:
            order.append(name)
            return time

        return run

    times = interleaved({"a": candidate("a", 1.0), "b": candidate("b", 2.0)}, budget=0)
    assert order == ["a", "b"] * 4
    assert times["b"] == (2.0, 2.0, 2.0, 3)


SMALL = [
    Case("operators", "linear_scan", (1, 8, 16), "f32", True),
    Case("operators", "simple_gate_loop", (1, 8, 16), "bf16", False),
    Case("operators", "channel_gate_loop", (1, 8, 16), "f32", True),
    Case("heads", "gate_loop, head size 64", (1, 8, 64), "f32", True),
    Case("layers", "GateLoopedAttention, heads=8", (1, 8, 16), "bf16", True),
    Case("training", "step of 4096 tokens", (1, 8, 16), "f32", True),
    Case("decoding", "a token, depth 6", (1, 1, 16), "f32", False),
]


def test_the_command_writes_figures_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "every_case", lambda quick: SMALL)
    monkeypatch.setattr(cases, "FAR", 8000)
    assert main(["bench", "--out", str(tmp_path / "new"), "--seconds", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert [row["what"] for row in printed["cases"]] == [case.what for case in SMALL]
    for row in printed["cases"]:
        assert not row["failed"]
        assert all(0 <= t["least"] <= t["median"] <= t["most"] and t["runs"] >= 3 for t in row["seconds"].values())
    assert {"bound, fresh", "bound, reused", "numba", "jax.lax"} <= set(printed["cases"][0]["seconds"])
    table = (tmp_path / "new" / "cpu.md").read_text()
    assert table == report.markdown(printed)
    assert "| linear_scan (1, 8, 16) f32 forward + backward |" in table
    assert (tmp_path / "new" / "cpu.png").stat().st_size > 1000
    again = ["bench", "--out", str(tmp_path / "new"), "--seconds", "0", "--json", "--only", "decoding"]
    assert main(again) == 0
    merged = json.loads(capsys.readouterr().out)["cases"]
    assert merged[:-1] == printed["cases"][:-1]
    assert merged[-1] != printed["cases"][-1]
    torch.set_num_threads(2)
    try:
        assert main(again) == 2
    finally:
        torch.set_num_threads(1)
    assert "figures of another machine or number of threads" in capsys.readouterr().err


def test_what_cannot_run_is_said_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of order\nand more")

    monkeypatch.setattr(cases, "_jax_scan", broken)
    runs, failures = cases.candidates(SMALL[0], None)
    assert "jax.lax" not in runs
    assert failures == {"jax.lax": "RuntimeError: out of order"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "sports"], "--only: no group 'sports'; there are decoding, heads, layers, operators, training"),
        (["--peers", "no/python"], "--peers must be a Python interpreter, and 'no/python' is no file"),
        (["--seconds", "-1"], "--seconds must be 0 or more, not -1.0"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert capsys.readouterr().err == f"gateloop bench: error: {message}\n"


def test_a_peer_in_another_process_is_timed_and_says_what_fails() -> None:
    # This environment has our own package under the original's name: its classes answer to the same calls.
    peer = Peer(Path(sys.executable))
    try:
        run = peer.make("SimpleGateLoopLayer", (1, 8, 16), "f32", True)
        assert run() > 0
        with pytest.raises(PeerFailed, match="AttributeError"):
            peer.make("NoSuchLayer", (1, 8, 16), "f32", True)
    finally:
        peer.close()


def test_the_step_without_recurrence_has_the_same_parameters() -> None:
    builders = dict(cases.steps(Case("training", "", (1, 8, 64), "f32", True), None))
    assert set(builders) == {"ours", "no recurrence", "attention"}
    ours = sum(p.numel() for p in cases.Transformer(512, num_tokens=256, depth=6).parameters())
    torch.manual_seed(0)
    attention = cases.attention_model(512)
    assert abs(sum(p.numel() for p in attention.parameters()) / ours - 1) < 0.02
