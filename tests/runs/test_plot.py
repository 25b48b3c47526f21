"""Loss curves: what is read from runs in whatever state, what is drawn, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gateloop_transformer.cli import main
from gateloop_transformer.runs.curves import Curve, Points, read_curve
from gateloop_transformer.runs.plot import draw_curve, draw_rates

PNG = b"\x89PNG"


def make_run(folder: Path, steps: int = 20, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for n in range(1, steps + 1):
        loss = math.log(2) * (2 + 4 / n)
        lines.append(
            {"step": n, "loss": loss, "tokens": 100 * n, "seconds": 0.5 * n, "memory": 5, "shares": {"data": 1}}
        )
        if n % 10 == 0:
            lines.append({"step": n, "bits_per_byte": 2.5 - n / 100, "sample": "text"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


def test_points_of_a_run_and_half_a_last_line(tmp_path: Path) -> None:
    curve = read_curve(make_run(tmp_path / "run", tail='{"step": 21, "lo'))
    assert curve.name == "run"
    assert curve.train.steps == list(range(1, 21))
    assert curve.train.bits == pytest.approx([2 + 4 / n for n in range(1, 21)])
    # Tokens and time of a validation are those of the step before it.
    assert curve.valid == Points([1000.0, 2000.0], [5.0, 10.0], [10, 20], [2.4, 2.3])


def test_losses_of_other_tokens_than_bytes_are_read_in_bits_per_byte(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "train_bits_per_byte": 2.5}\n')
    assert read_curve(tmp_path).train.bits == [2.5]


def test_several_runs_are_drawn_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / "a" / "run")), str(make_run(tmp_path / "b" / "run", 900))]
    out = tmp_path / "out.png"
    out.write_bytes(PNG + b"an older one")
    assert main(["plot", *runs, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == str(out)
    assert [row["run"] for row in found["runs"]] == runs
    first = found["runs"][0]
    assert (first["steps"], first["tokens"], first["seconds"]) == (20, 2000, 10)
    assert first["train_bits_per_byte"] == pytest.approx(2.2)
    assert (first["bits_per_byte"], first["best_bits_per_byte"]) == (2.3, 2.3)
    drawn = out.read_bytes()
    assert drawn.startswith(PNG)
    assert len(drawn) > 10_000
    assert main(["plot", *runs, "--out", str(out), "--against", "time"]) == 0
    assert f"{runs[0]}: 2.3000 bits per byte on validation data after 20 steps" in capsys.readouterr().out
    assert out.read_bytes() != drawn


def test_runs_that_have_only_begun_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "loss": NaN}\n')
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert "run: no validation yet after 2 steps" in capsys.readouterr().out
    draw_curve(run / "metrics.jsonl", run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gateloop_transformer.runs import plot

    legends: list[Any] = []
    real = plot.save_png

    def save(figure: Any, target: Path) -> None:
        real(figure, target)
        legends.append((figure.legends or [figure.axes[0].get_legend()])[0])

    monkeypatch.setattr(plot, "save_png", save)
    # Two dollars are a formula to matplotlib, here one with an error in it; what begins with "_" it leaves out.
    names = ["$\\frac{$", "_own", "a\udcffb", "$x$"]
    curves = [read_curve(make_run(tmp_path / str(n)), name) for n, name in enumerate(names)]
    plot.draw_curves(curves, tmp_path / "curves.png")
    draw_rates({name: [(1e-3, 2.0)] for name in names}, tmp_path / "rates.png")
    for legend in legends:
        assert [text.get_text() for text in legend.get_texts()] == ["$\\frac{$", "_own", "a\ufffdb", "$x$"]
        assert not any(text.get_parse_math() for text in legend.get_texts())
    assert len(legends) == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": 2.0, "tokens": null}',
        '{"step": 1, "loss": null}',
        '{"step": 1.5, "loss": 2.0}',
        '{"step": 1, "bits_per_byte": "2.0"}',
        f'{{"step": 1, "loss": 2.0, "seconds": {10**400}}}',
        '{"step": 1, "loss": true}',
    ],
)
def test_metrics_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    number = len((run / "metrics.jsonl").read_text().splitlines())
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert f"metrics.jsonl', line {number} is damaged: " in error_of(capsys)


def test_rates_are_drawn(tmp_path: Path) -> None:
    target = tmp_path / "rates.png"
    draw_rates({"": [(1e-3, 2.0), (1e-3, 2.2), (1e-2, 1.9)]}, target)
    assert target.read_bytes().startswith(PNG)


def test_what_cannot_be_plotted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    empty, bare, text = tmp_path / "empty", tmp_path / "bare", tmp_path / "text.png"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text('{"step": 1, "lo')
    bare.mkdir()
    text.write_text("not a PNG")
    for runs, out, problem in (
        ([tmp_path / "absent"], "x.png", "no folder"),
        ([bare], "x.png", "has no metrics.jsonl"),
        ([empty], "x.png", "holds no losses yet"),
        ([run, run], "x.png", "named twice"),
        ([run], "x.txt", "must end in .png"),
        ([run], "text.png", "exists and is no PNG"),
        ([run], "absent/x.png", "no folder"),
    ):
        assert main(["plot", *map(str, runs), "--out", str(tmp_path / out)]) == 2
        assert problem in error_of(capsys)
    assert text.read_text() == "not a PNG"
    assert not (tmp_path / "x.png").exists()


def test_an_empty_curve_has_no_points() -> None:
    assert Curve("x").train.against("tokens") == []
