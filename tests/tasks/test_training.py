"""Models, scoring and curriculum."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gateloop_transformer.tasks import curriculum as curriculum_module
from gateloop_transformer.tasks.curriculum import Curriculum
from gateloop_transformer.tasks.experiment import Experiment, accuracy_by_span, run
from gateloop_transformer.tasks.models import build_model
from gateloop_transformer.tasks.scoring import answers, by_span, score, score_lengths
from gateloop_transformer.tasks.settings import GENERAL, MODELS, TaskTraining, defaults
from gateloop_transformer.tasks.state_tracking import Counting, Parity
from gateloop_transformer.tasks.table import TASKS
from gateloop_transformer.tasks.task import NONE, Batch, generator

SMALL: dict[str, Any] = {"dim": 16, "gate_loop_heads": 4, "rows": 64, "lengths": "12,20"}


class Knows(nn.Module):
    """Counts ones modulo 2 exactly, the count carried as its state, and is wrong at chosen steps."""

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, ids: Tensor, state: Any = None, *, return_state: bool = False) -> Any:
        assert return_state
        assert not self.training
        count, steps = (0, 0) if state is None else state
        counts = count + (ids == 1).long().cumsum(1)
        answer = counts % 2
        for step in self.wrong:
            if steps <= step < steps + ids.shape[1]:
                answer[:, step - steps] = 1 - answer[:, step - steps]
        # A token that is no answer is the likeliest of all.
        logits = torch.nn.functional.one_hot(answer, 4).float() + torch.tensor([0.0, 0.0, 0.0, 9.0])
        return logits, (counts[:, -1:], steps + ids.shape[1])


def test_scores_are_of_the_last_and_of_all_answers() -> None:
    batch = Counting(modulus=2).batch(generator(0), 50, 12)
    model = Knows().train()
    good, one, last = (score(Knows(wrong), Parity(), batch) for wrong in ((), (5,), (11,)))
    assert (good.last, good.every) == (1.0, 1.0)
    assert (one.last, one.every) == (1.0, 0.9)
    assert (last.last, last.every) == (0.0, 0.9)
    ones = int(batch.targets[:, -1].sum())
    assert good.commonest == max(ones, 50 - ones) / 50
    score(model, Parity(), batch)
    assert model.training


def test_spans_are_counted_by_powers_of_two() -> None:
    right = np.array([True, False, True, True, False])
    counts = by_span(right, np.array([1, 1, 2, 3, 4]))
    assert counts == {0: (1, 2), 1: (2, 2), 2: (0, 1)}
    batch = Batch(np.ones((1, 3), np.int64), np.array([[NONE, 1, 0]]), np.array([[0, 1, 3]]))
    scored = score(Knows(), Parity(), batch)
    # Counts are 1, 2, 3: the first asked is wrong, the second too.
    assert scored.by_span == {0: (0, 1), 1: (0, 1)}
    assert accuracy_by_span([scored, dataclasses.replace(scored, by_span={1: (3, 3)})]) == {"1": 0.0, "2-3": 0.75}


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_with_a_carried_state_are_the_whole(kind: str) -> None:
    given: dict[str, Any] = {"model": kind, "modulus": 60, "dim": 16, "depth": 2}
    if kind == "gateloop":
        # Memories short enough, and outputs large enough, for what was read to change answers.
        given |= {"gate_loop_heads": 4, "min_memory": 1.0, "max_memory": 64.0, "head_norm": True}
    if kind == "transformer":
        given |= {"dim_head": 4}
    experiment = Experiment.of(TASKS["counting"], given)
    model = build_model(kind, experiment.model, experiment.task.vocabulary).eval()
    inputs = experiment.task.batch(generator(0), 8, 50).inputs
    whole = model(torch.from_numpy(inputs)).detach()[..., :60]
    best, second = whole.topk(2).values.unbind(-1)
    sure, expected = (best - second > 1e-4).numpy(), whole.argmax(-1).numpy()
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(answers(model, inputs, 60, block=7)[sure], expected[sure])
    forgetful = np.concatenate([answers(model, part, 60) for part in np.split(inputs, range(7, 50, 7), 1)], 1)
    assert (forgetful != expected)[sure].any()


def test_tests_are_the_same_sequences_again_and_fewer_long_ones() -> None:
    seen: list[np.ndarray[Any, Any]] = []

    class Recording(Parity):
        def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
            batch = super().batch(rng, rows, length)
            seen.append(batch.inputs)
            return batch

    for _ in range(2):
        scores = score_lengths(Knows(), Recording(), (9, 2500), 70, seed=3)
        assert [len(inputs) for inputs in seen[-2:]] == [70, 64]
        assert {each.last for each in scores.values()} == {1.0}
    np.testing.assert_array_equal(seen[0], seen[2])


def test_parity_is_learned_in_seconds_and_the_same_again() -> None:
    given = {**SMALL, "steps": 260, "longest": 20, "tokens": 1200, "seed": 1}
    experiment = Experiment.of(Parity, given)
    first = run(experiment).to_json()
    assert first["trained_lengths"] == [4, 20]
    assert first["accuracy_by_length"]["20"] > 0.95
    assert first["chance"] == 0.5
    short = Experiment.of(Parity, {**given, "steps": 5})
    one, two = (run(short) for _ in range(2))
    for parameter, same in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(parameter, same)


@pytest.mark.parametrize("kind", ["transformer", "lstm", "gru"])
def test_other_models_train(kind: str) -> None:
    small = {name: SMALL[name] for name in ("dim", "rows", "lengths")}
    outcome = run(Experiment.of(Counting, {**small, "model": kind, "steps": 3}))
    assert outcome.progress.step == 3
    assert math.isfinite(outcome.progress.loss)
    assert outcome.to_json()["gate"] is None


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_with_its_defaults(name: str) -> None:
    task = TASKS[name]
    experiment = Experiment.of(task, {"steps": 2, "tokens": 64, "rows": 8, "least_rows": 2})
    tested = min(experiment.training.tested_lengths(experiment.task))
    experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, lengths=str(tested)))
    result = run(experiment).to_json()
    assert list(result["accuracy_by_length"]) == [str(tested)]
    assert ("accuracy_by_span" in result) == (name in ("horizon", "copying", "recall", "induction"))


def test_lengths_grow_when_solved_and_the_rate_falls_after_the_last() -> None:
    settings = TaskTraining(steps=1000, first=4, longest=10, growth=1.5, decay=0.25, lr=1e-2)
    model = build_model("gru", Experiment.of(Parity, {"dim": 8}).model, 4)
    curriculum = Curriculum(model, Parity(), settings)
    progress = curriculum.progress
    assert progress.longest == 4
    progress.step = 100
    for expected in (7, 10):
        progress.accuracy = 0.99
        assert curriculum.rate() == pytest.approx(1e-2 * math.sqrt(4 / progress.longest))
        curriculum._grow(1.0)
        assert (progress.longest, progress.falling) == (expected, None)
        assert progress.accuracy == 0.0
    for _ in range(40):
        curriculum._grow(1.0)
    assert progress.falling == 0.1
    progress.step = 225
    assert curriculum.rate() == pytest.approx(0.5e-2 * math.sqrt(0.4))
    progress.step = 350
    assert curriculum.rate() == 0


def test_unsolved_lengths_end_with_a_falling_rate_too() -> None:
    settings = TaskTraining(steps=100, decay=0.5, lr=1e-2, seconds=60.0)
    curriculum = Curriculum(build_model("gru", Experiment.of(Parity, {"dim": 8}).model, 4), Parity(), settings)
    for step, left in ((49, 1.0), (75, 0.5), (100, 0.0)):
        curriculum.progress.step = step
        assert curriculum.rate() == pytest.approx(1e-2 * left)
    curriculum.progress.step = 60
    curriculum.progress.seconds = 45.0
    assert curriculum.done() == 0.75


def test_seconds_count_from_the_end_of_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def step(self: Curriculum, _rate: float) -> None:
        nonlocal now
        now += 1.0 if self.progress.step else 1000.0
        self.progress.step += 1

    monkeypatch.setattr(Curriculum, "_step", step)
    monkeypatch.setattr(curriculum_module, "time", SimpleNamespace(perf_counter=lambda: now))
    settings = TaskTraining(seconds=5.0)
    curriculum = Curriculum(build_model("gru", Experiment.of(Parity, {"dim": 8}).model, 4), Parity(), settings)
    assert curriculum.run().seconds == 5.0
    assert curriculum.progress.step == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"seconds": 0.0}, "seconds must be"),
        ({"growth": 1.0}, "growth must be"),
        ({"solved": 1.0}, "solved must be"),
        ({"decay": 0.0}, "decay must be"),
        ({"smoothing": 1.0}, "smoothing must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"lengths": "40;50"}, "numbers and commas"),
        ({"lengths": "1"}, "lengths: parity has none below 2, not 1"),
        ({"first": 50, "longest": 40}, "from 50 to 40"),
        ({"model": "lstm", "dim": 0}, "dim and depth"),
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(Experiment.of(Parity, {"steps": 1, **wrong}))


def test_what_is_asked_for_comes_before_the_model_and_the_task() -> None:
    assert Experiment.of(TASKS["horizon"], {}).model.dim == GENERAL["dim"] == 64
    assert Experiment.of(Parity, {}).model.dim == Parity.settings["dim"] == 32
    assert Experiment.of(Parity, {"dim": 8}).model.dim == 8
    assert Experiment.of(Parity, {"model": "gru"}).training.weight_decay == 0.1
    baseline = Experiment.of(TASKS["horizon"], {"model": "transformer"}).model
    assert not baseline.use_gate_looped_attn
    assert baseline.rotary_emb
    assert defaults(Parity)["gate"] == "ring"


def test_a_loss_that_is_not_finite_ends_training() -> None:
    experiment = Experiment.of(Parity, {**SMALL, "steps": 3})
    model = build_model("gru", experiment.model, 4)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(RuntimeError, match="not finite at step 1"):
        Curriculum(model, experiment.task, experiment.training).run()
