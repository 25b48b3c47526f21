"""Training itself: what is said, learnt, optimised and carried, and what stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TEXT, TINY, error_of, metrics, train

from gateloop_transformer import Transformer
from gateloop_transformer.cli import main
from gateloop_transformer.data.batches import stream_at
from gateloop_transformer.data.corpus import load_corpus
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.runs.config import TrainingConfig, resolve
from gateloop_transformer.runs.folder import load_model
from gateloop_transformer.training.optimizer import parameter_groups
from gateloop_transformer.training.schedule import learning_rate


def test_progress_is_said_with_the_end_in_sight(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, tmp_path / "run", steps=4) == 0
    assert "\nstep 4/4: " in capsys.readouterr().out
    assert train(text, tmp_path / "other", "--eval-every", "1", "--minutes", "0.001", steps=None) == 0
    assert "\nstep 1: " in capsys.readouterr().out


def test_minutes_end_a_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("gateloop_transformer.training.watching.Clock.elapsed", lambda _clock: 0.5)
    assert main(["train", str(text), "--out", str(out), *TINY, "--minutes", "0.02"]) == 0
    # The first step, in which kernels are compiled, does not count.
    assert metrics(out)[-1]["step"] == 4
    assert train(text, tmp_path / "both", "--minutes", "1") == 2


def test_loss_falls(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--lr", "1e-2", "--eval-every", "60", "--checkpoint-every", "60", steps=60) == 0
    losses = [record["loss"] for record in metrics(out) if "loss" in record]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


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


def test_a_loss_that_is_not_finite_stops_with_step_and_layer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--lr", "1e30", "--warmup", "0") == 1
    error = capsys.readouterr().err
    assert "not finite at step" in error
    assert "layers.0" in error or "token_emb" in error
    assert "checkpoint" in error


def test_weights_that_are_not_finite_are_never_saved(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--lr", "1e38", "--warmup", "0", steps=1) == 1
    assert "not finite after step 1: first in" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


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


def test_the_learning_rate_rises_then_falls() -> None:
    config = TrainingConfig(lr=1.0, min_lr=0.1, warmup=0.1)
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.55)
    assert learning_rate(config, 1.0) == pytest.approx(0.1)
    assert learning_rate(config, 1.3) == pytest.approx(0.1)


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
