"""Every generator against a definition in plain Python, token by token."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gateloop_transformer.tasks.digits import PermutedDigits, SequentialDigits
from gateloop_transformer.tasks.listops import CLOSE, PAD, ListOps
from gateloop_transformer.tasks.memory import MemoryHorizon, SelectiveCopying
from gateloop_transformer.tasks.recall import AssociativeRecall, InductionHeads
from gateloop_transformer.tasks.state_tracking import Counting, ModularArithmetic, Parity, SymmetricGroup
from gateloop_transformer.tasks.table import TASKS
from gateloop_transformer.tasks.task import NONE, Batch, Task, generator, last_asked

Asked = dict[int, int]
# What a definition gives for the tokens of one sequence: answers by step, and spans by step.
Definition = Callable[[Any, list[int]], tuple[Asked, Asked]]


def counting(task: Counting, tokens: list[int]) -> tuple[Asked, Asked]:
    first = task.marks
    assert tokens[:first] == list(range(2, 2 + first))
    assert set(tokens[first:]) <= {0, 1}
    return {t: sum(tokens[first : t + 1]) % task.modulus for t in range(first, len(tokens))}, {}


def arithmetic(task: ModularArithmetic, tokens: list[int]) -> tuple[Asked, Asked]:
    m = task.modulus
    assert tokens[:2] == [m + 3, m + 4]
    words = [str(token) if token < m else "+-*"[token - m] for token in tokens[2:]]
    asked = {}
    for place in range(0, len(words), 2):
        assert words[place].isdigit()
        assert place == 0 or words[place - 1] in "+-*"
        asked[2 + place] = eval("".join(words[: place + 1])) % m
    return asked, {}


def symmetric(task: SymmetricGroup, tokens: list[int]) -> tuple[Asked, Asked]:
    orders = list(itertools.permutations(range(5)))
    things, asked = tuple(range(5)), {}
    assert tokens[:2] == [120, 121]
    for t, token in enumerate(tokens[2:], 2):
        things = tuple(orders[token][thing] for thing in things)
        asked[t] = orders.index(things)
    return asked, {}


def horizon(task: MemoryHorizon, tokens: list[int]) -> tuple[Asked, Asked]:
    store, recall, forget = range(task.values + 1, task.values + 4)
    held = since = 0
    asked, spans = {}, {}
    for t, token in enumerate(tokens):
        if t and tokens[t - 1] == store:
            assert 1 <= token <= task.values
            held, since = token, t
        elif token == forget:
            held, since = 0, t
        elif token == recall:
            asked[t], spans[t] = held, t - since
        else:
            assert token == store or 1 <= token <= task.values
    return asked, spans


def copying(task: SelectiveCopying, tokens: list[int]) -> tuple[Asked, Asked]:
    noise, now = task.values, task.values + 1
    body = len(tokens) - task.items
    assert tokens[body:] == [now] * task.items
    data = [t for t in range(body) if tokens[t] != noise]
    assert len(data) == task.items
    steps = list(zip(range(body, len(tokens)), data, strict=True))
    return {t: tokens[place] for t, place in steps}, {t: t - place for t, place in steps}


def recall(task: AssociativeRecall, tokens: list[int]) -> tuple[Asked, Asked]:
    start, filler = 2 * task.pairs, task.values + task.keys
    values = {tokens[t]: (tokens[t + 1], t + 1) for t in range(0, start, 2)}
    assert len(values) == task.pairs
    assert all(task.values <= key < filler and value < task.values for key, (value, _) in values.items())
    queries = [t for t in range(start, len(tokens)) if tokens[t] != filler]
    assert sorted(tokens[t] for t in queries) == sorted(values)
    asked, spans = {}, {}
    for t in queries:
        assert t % 2 == 0
        asked[t], place = values[tokens[t]]
        spans[t] = t - place
    return asked, spans


def induction(task: InductionHeads, tokens: list[int]) -> tuple[Asked, Asked]:
    places = [t for t, token in enumerate(tokens) if token == task.values]
    assert len(places) == 2
    assert places[1] == len(tokens) - 1
    return {places[1]: tokens[places[0] + 1]}, {places[1]: places[1] - places[0] - 1}


def value(tokens: list[int], place: int, depth: int, task: ListOps) -> tuple[int, int]:
    """The value of what starts at a place, and where it ends."""
    if tokens[place] < 10:
        return tokens[place], place + 1
    assert depth < task.nesting
    do = [min, max, statistics.median_low, lambda given: sum(given) % 10][tokens[place] - 10]
    values, place = [], place + 1
    while tokens[place] != CLOSE:
        each, place = value(tokens, place, depth + 1, task)
        values.append(each)
    assert 2 <= len(values) <= task.arguments
    return do(values), place + 1


def listops(task: ListOps, tokens: list[int]) -> tuple[Asked, Asked]:
    written = [token for token in tokens if token != PAD]
    assert tokens[len(tokens) - len(written) :] == written
    assert len(written) >= len(tokens) / 2
    result, end = value(written, 0, 0, task)
    assert end == len(written)
    return {len(tokens) - 1: result}, {}


CASES: list[tuple[Task, tuple[int, ...], Definition]] = [
    (Parity(), (2, 3, 40), counting),
    (Parity(marks=3), (4, 40), counting),
    (Counting(modulus=5), (3, 40), counting),
    (Counting(modulus=60), (200,), counting),
    (ModularArithmetic(), (3, 4, 5, 41, 42), arithmetic),
    (ModularArithmetic(modulus=7), (42,), arithmetic),
    (SymmetricGroup(), (3, 40), symmetric),
    (SymmetricGroup(generators="all"), (40,), symmetric),
    (MemoryHorizon(), (3, 4, 64, 301), horizon),
    (MemoryHorizon(values=3, max_span=5, forgets=1.0), (64,), horizon),
    (SelectiveCopying(), (16, 17, 100), copying),
    (SelectiveCopying(values=3, items=1), (2, 9), copying),
    (AssociativeRecall(), (32, 33, 128), recall),
    (AssociativeRecall(pairs=3, keys=3, values=2, power=1.0), (12, 40), recall),
    (InductionHeads(), (3, 4, 100), induction),
    (ListOps(), (4, 7, 16, 64), listops),
    (ListOps(arguments=2, nesting=3), (7, 20), listops),
]


@pytest.mark.parametrize(
    ("task", "lengths", "definition"), CASES, ids=[f"{task.name}-{lengths}" for task, lengths, _ in CASES]
)
def test_answers_and_spans_are_those_of_the_definition(
    task: Task, lengths: tuple[int, ...], definition: Definition
) -> None:
    for length, seed in itertools.product(lengths, (0, 1)):
        batch = task.batch(generator(seed, 7), 8, length)
        check_shapes(task, batch, 8, length)
        for row in range(8):
            asked, spans = definition(task, batch.inputs[row].tolist())
            assert asked == {t: int(a) for t, a in enumerate(batch.targets[row]) if a != NONE}
            if batch.spans is not None:
                assert spans == {t: int(s) for t, s in enumerate(batch.spans[row]) if s != 0}
                assert min(spans.values()) >= 1


def check_shapes(task: Task, batch: Batch, rows: int, length: int) -> None:
    assert batch.inputs.shape == batch.targets.shape == (rows, length)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.inputs.min() >= 0
    assert batch.inputs.max() < task.vocabulary
    answers = batch.targets[batch.targets != NONE]
    assert answers.min() >= 0
    assert answers.max() < task.answers <= task.vocabulary
    assert batch.spans is None or ((batch.spans == 0) == (batch.targets == NONE)).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_depends_on_its_generator_alone(name: str) -> None:
    task = TASKS[name]()
    length = max(task.shortest, 64)
    one, again, other = (task.batch(generator(*place), 4, length) for place in ((3, 1), (3, 1), (3, 2)))
    for first, second in zip(one, again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert (one.inputs != other.inputs).any()


@pytest.mark.parametrize("name", TASKS)
def test_lengths_that_are_too_small_are_refused(name: str) -> None:
    task = TASKS[name]()
    with pytest.raises(ValueError, match=f"{name}: a batch needs .* length of at least {task.shortest}"):
        task.batch(generator(0), 2, task.shortest - 1)
    with pytest.raises(ValueError, match="at least 1 row"):
        task.batch(generator(0), 0, task.shortest)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Counting, {"modulus": 1}),
        (Counting, {"marks": 0}),
        (ModularArithmetic, {"modulus": 1}),
        (MemoryHorizon, {"forgets": 1.5}),
        (MemoryHorizon, {"values": 0}),
        (SelectiveCopying, {"items": 0}),
        (AssociativeRecall, {"keys": 7}),
        (AssociativeRecall, {"power": 0.0}),
        (InductionHeads, {"values": 0}),
        (ListOps, {"arguments": 1}),
        (ListOps, {"nesting": 0}),
    ],
)
def test_parameters_without_a_meaning_are_refused(kind: type[Task], wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        kind(**wrong)


def test_all_answers_of_counting_are_as_likely() -> None:
    batch = Counting(modulus=3).batch(generator(0), 3000, 40)
    counts = np.bincount(batch.targets[:, -1])
    assert counts.min() > 920
    assert counts.max() < 1080


def test_spans_of_the_horizon_are_log_uniform() -> None:
    spans = MemoryHorizon(forgets=0.0).batch(generator(0), 400, 1026).spans
    assert spans is not None
    # The first of a sequence has all the room: half of them are below √1025.
    first = np.array([row[row > 0][0] for row in spans])
    assert 0.4 < (first < 32).mean() < 0.6
    assert 0.05 < (first >= 512).mean() < 0.16


def test_queries_are_near_or_anywhere() -> None:
    near, anywhere = (
        np.concatenate(
            [np.nonzero(row != NONE)[0] for row in AssociativeRecall(power=power).batch(rng, 200, 256).targets]
        )
        for power, rng in ((0.1, generator(0)), (1.0, generator(0)))
    )
    assert abs(anywhere.mean() - 136) < 8
    assert near.mean() < 80


def test_digits_are_the_images_and_the_test_is_apart() -> None:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    known = {tuple(image.astype(int)): int(label) for image, label in zip(pixels, classes, strict=True)}
    task = SequentialDigits()
    train, test = task.batch(generator(0), 50, 64), task.test_batch(generator(0), 1, 64)
    assert len(test.inputs) == len(pixels) // 5
    for batch in (train, test):
        check_shapes(task, batch, len(batch.inputs), 64)
        for image, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert targets == [NONE] * 63 + [known[tuple(image)]]
    held = {tuple(image) for image in test.inputs.tolist()}
    assert not held & {tuple(image) for image in task.batch(generator(1), 3000, 64).inputs.tolist()}
    with pytest.raises(ValueError, match="length of 64, not 65"):
        task.batch(generator(0), 1, 65)


def test_permuted_digits_are_in_one_other_order() -> None:
    plain, permuted, other = (
        task.test_batch(generator(0), 1, 64).inputs
        for task in (SequentialDigits(), PermutedDigits(), PermutedDigits(order_seed=1))
    )
    assert (plain != permuted).any()
    assert (permuted != other).any()
    order = PermutedDigits().order
    assert sorted(order) == list(range(64))
    np.testing.assert_array_equal(plain[:, order], permuted)


def test_the_last_answer_asked() -> None:
    targets = np.array([[1, NONE, 2, NONE], [3, NONE, NONE, NONE]])
    assert last_asked(targets).tolist() == [2, 0]
    with pytest.raises(ValueError, match="asks for nothing"):
        last_asked(np.full((1, 3), NONE))
