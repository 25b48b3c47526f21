"""The learning rate's schedules, and the presets."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from gateloop_transformer.runs.config import TrainingConfig, resolve
from gateloop_transformer.runs.presets import PRESETS
from gateloop_transformer.training.schedule import learning_rate

SCHEDULES = ["cosine", "wsd", "constant"]
DONE = [n / 1000 for n in range(1001)]


def config(schedule: str, **given: Any) -> TrainingConfig:
    return TrainingConfig(**{"lr": 2.0, "min_lr": 0.1, "warmup": 0.25, "schedule": schedule, **given})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rises_to_the_peak_in_a_line_and_never_again(schedule: str) -> None:
    rates = [learning_rate(config(schedule), done) for done in DONE]
    assert rates[:250] == pytest.approx([2.0 * done / 0.25 for done in DONE[:250]])
    assert rates[250] == max(rates) == 2.0
    assert all(a >= b for a, b in pairwise(rates[250:]))


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("cosine", 0.625, 2.0 * 0.55),
        ("cosine", 1.0, 0.2),
        ("cosine", 1.7, 0.2),
        ("wsd", 0.8, 2.0),
        ("wsd", 0.85, 2.0 * (0.1 + 0.9 * 0.5)),
        ("wsd", 0.9, 2.0 * (0.1 + 0.9 * (1 - math.sqrt(0.5)))),
        ("wsd", 1.0, 0.2),
        ("wsd", 1.7, 0.2),
        ("constant", 1.0, 2.0),
        ("constant", 1.7, 2.0),
    ],
)
def test_known_values(schedule: str, done: float, expected: float) -> None:
    assert learning_rate(config(schedule), done) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_warm_up_starts_at_the_peak(schedule: str) -> None:
    assert learning_rate(config(schedule, warmup=0.0), 0.0) == 2.0


def test_wsd_may_fall_from_the_end_of_the_warm_up_on() -> None:
    assert learning_rate(config("wsd", decay=0.75), 0.25) == 2.0
    assert learning_rate(config("wsd", decay=0.75), 0.26) < 2.0
    # Other schedules do not use `decay`.
    config("cosine", decay=0.9)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"decay": 0.76}, "warmup \\+ decay must be at most 1 for the wsd schedule, not 1.01"),
        ({"decay": 0.0}, "decay must be in \\(0, 1\\], not 0"),
        ({"decay": 1.5}, "decay must be in \\(0, 1\\], not 1.5"),
        ({"decay": math.nan}, "decay must be in"),
    ],
)
def test_decays_without_a_meaning_are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        config("wsd", **given)


@pytest.mark.parametrize("preset", ["base", "medium", "large", "xl"])
def test_large_presets_have_heads_of_64_and_large_steps(preset: str) -> None:
    run = resolve(preset, {}, None)
    assert run.model.dim == 64 * (run.model.gate_loop_heads or 0)
    tokens = run.training.context * run.training.batch * run.training.accumulate
    assert tokens in (2**18, 2**19)
    assert PRESETS[preset]["schedule"] == run.training.schedule == "wsd"
