"""The benchmark: what it writes, and what it refuses. No figure is judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

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
    Case("heads", "gate_loop, head size 64", (1, 16, 64), "f32", True),
    Case("layers", "GateLoopedAttention, heads=8", (1, 8, 16), "bf16", True),
    Case("training", "step of 4096 tokens", (1, 8, 16), "f32", True),
    Case("decoding", "a token, far", (1, 1, 16), "f32", False),
]


def test_the_command_writes_figures_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "every_case", lambda quick: SMALL)
    monkeypatch.setattr(cases, "FAR", {"a token, far": 5000})
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
        (
            ["--only", "sports"],
            "--only: there is no group 'sports'; there are decoding, heads, layers, operators, training",
        ),
        (["--peers", "no/python"], "--peers must be a Python interpreter, but 'no/python' is not a file"),
        (["--seconds", "-1"], "--seconds must be 0 or more, not -1.0"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert capsys.readouterr().err == f"gateloop bench: error: {message}\n"


@pytest.mark.slow
def test_a_peer_in_another_process_is_timed_and_says_what_fails() -> None:
    # This environment has our own package under the original's name: its classes answer to the same calls.
    peer = Peer(Path(sys.executable))
    try:
        long, short = (peer.make("SimpleGateLoopLayer", (1, T, 16), "f32", True) for T in (4000, 2))
        long(), short()
        # Each runs what it was made for.
        assert min(long() for _ in range(5)) > min(short() for _ in range(5)) > 0
        with pytest.raises(PeerFailed, match="AttributeError"):
            peer.make("NoSuchLayer", (1, 8, 16), "f32", True)
        peer.clear()
        with pytest.raises(PeerFailed, match="IndexError"):
            short()
        assert peer.make("SimpleGateLoopLayer", (1, 2, 16), "f32", True)() > 0
    finally:
        peer.close()


def row(what: str, B: int, T: int, backward: bool = True, dtype: str = "f32") -> dict[str, Any]:
    times = {"median": 1e-3 * T, "least": 1e-3, "most": 1.0}
    return {"what": what, "shape": (B, T, 8), "dtype": dtype, "backward": backward, "seconds": {"ours": times}}


def test_the_picture_has_a_panel_for_all_that_was_timed_at_several_lengths(tmp_path: Path) -> None:
    scan = [row("scan", 1, 64), row("scan", 8, 32), row("scan", 1, 16)]
    steps = [row("step", 4, 16), row("step", 1, 64)]
    others = [row("scan", 1, 128, dtype="bf16"), row("scan", 1, 256, backward=False), row("token", 1, 1)]
    panels = report._panels([*scan, *steps, *others])
    assert panels == {"scan": [scan[2], scan[0]], "step": steps}
    assert report.draw({"cases": [*scan, *steps, *others]}, tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 1000
    assert not report.draw({"cases": others}, tmp_path / "none.png")


@pytest.mark.parametrize("quick", [False, True])
def test_operators_layers_and_heads_are_timed_at_several_lengths(quick: bool) -> None:
    rows = [case._asdict() for case in cases.every_case(quick)]
    panels = report._panels(rows)
    assert {r["what"] for r in rows if r["group"] in ("operators", "layers", "heads")} <= set(panels)


@pytest.mark.parametrize(
    ("T", "dtype", "names"),
    [
        (256, "f32", set(cases.MAMBA)),
        (1024, "f32", {"HF Mamba, pscan"}),
        (4096, "f32", set()),
        (256, "bf16", set()),
    ],
)
def test_mamba_runs_where_it_ends_in_time(T: int, dtype: str, names: set[str]) -> None:
    asked: list[Any] = []

    class Asked:
        def make(self, *arguments: Any, **options: Any) -> None:
            asked.append((arguments, options))

    case = Case("layers", "GateLoopedAttention, heads=8", (1, T, 8), dtype, True)
    builders = dict(cases.layers(case, cast(Peer, Asked())))
    assert set(builders) == {"ours", "original"} | names
    for name in names:
        builders[name]()
    assert all(arguments == ("mamba", (1, T, 8), "f32", True) for arguments, _ in asked)


def test_far_is_after_a_million_tokens_unless_quick_and_the_row_says_so() -> None:
    full, quick = (cases.every_case(quick)[-1].what for quick in (False, True))
    assert full == "a token, depth 6, far: after 1,000,000"
    assert cases.FAR[full] == 1_000_000
    assert cases.FAR[quick] == 20_000
    assert "20,000" in quick


def test_the_far_state_is_that_after_all_tokens() -> None:
    read: list[int] = []

    class Model(cases.Transformer):
        def forward(self, ids: Any, *rest: Any, **options: Any) -> Any:
            read.append(ids.shape[1])
            return super().forward(ids, *rest, **options)

    state = cases._after(Model(16, num_tokens=256, depth=1), 5000)
    assert sum(read) == 5000
    assert state.layers[0].real.dtype == torch.float32


def test_the_step_without_recurrence_has_the_same_parameters() -> None:
    builders = dict(cases.steps(Case("training", "", (1, 8, 64), "f32", True), None))
    assert set(builders) == {"ours", "no recurrence", "attention"}
    ours = sum(p.numel() for p in cases.Transformer(512, num_tokens=256, depth=6).parameters())
    torch.manual_seed(0)
    attention = cases.attention_model(512)
    assert abs(sum(p.numel() for p in attention.parameters()) / ours - 1) < 0.02
