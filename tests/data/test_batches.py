"""Batches: every window once an epoch, in an order that the step alone decides."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from gateloop_transformer.data.batches import Batch, batch_at, permute, stream_at
from gateloop_transformer.data.shards import Tokens

SHAPE: dict[str, Any] = {"windows": 6, "context": 16, "seed": 1}


def tokens(length: int) -> Tokens:
    return Tokens.of(np.arange(length))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 65, 1000])
def test_a_shuffle_is_a_bijection(count: int) -> None:
    orders = []
    for seed in range(3):
        keys = np.random.default_rng(seed).integers(0, 2**64, 6, dtype=np.uint64)
        orders.append(permute(np.arange(count), count, keys).tolist())
        assert sorted(orders[-1]) == list(range(count))
    if count >= 10:
        assert orders[0] != orders[1]
        # No neighbour follows its neighbour more often than chance has it.
        assert sum(b - a == 1 for a, b in itertools.pairwise(orders[0])) < 5 + count / 50


def test_shuffled_places_are_even() -> None:
    """Over many keys every number comes to every place about equally often."""
    count = 50
    seen = np.zeros((count, count))
    for seed in range(2000):
        keys = np.random.default_rng(seed).integers(0, 2**64, 6, dtype=np.uint64)
        seen[np.arange(count), permute(np.arange(count), count, keys)] += 1
    # Chi-squared over count² cells of mean 40: within 5 standard deviations.
    statistic = ((seen - 40) ** 2 / 40).sum()
    degrees = (count - 1) ** 2
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_every_epoch_has_every_window_once_in_its_own_order() -> None:
    data = tokens(16 * 12 + 9)
    windows = [row for step in range(1, 7) for row in batch_at(data, step, **SHAPE).ids]
    epochs = [windows[:12], windows[12:24], windows[24:36]]
    orders = []
    for epoch in epochs:
        starts = [int(row[0]) for row in epoch]
        shift = min(starts)
        assert shift <= 8
        assert sorted(starts) == [shift + 16 * n for n in range(12)]
        assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + 17)) for row in epoch)
        orders.append([start - shift for start in starts])
    assert orders[0] != orders[1] != orders[2]
    assert len({min(int(row[0]) for row in epoch) for epoch in epochs}) > 1


def test_a_batch_may_be_longer_than_an_epoch() -> None:
    data, shape = tokens(16 * 3 + 1), {**SHAPE, "windows": 10}
    starts = batch_at(data, 1, **shape).ids[:, 0].tolist()
    assert [sorted(starts[n : n + 3]) for n in (0, 3, 6)] == [[0, 16, 32]] * 3


@pytest.mark.parametrize("draw", [batch_at, stream_at])
def test_batches_depend_on_the_arguments_alone(draw: Any) -> None:
    data = tokens(1000)
    later = draw(data, 7, **SHAPE).ids
    assert later.dtype == torch.int64
    assert later.shape == (6, 17)
    assert later.equal(draw(data, 7, **SHAPE).ids)
    for other in (draw(data, 8, **SHAPE), draw(data, 7, **{**SHAPE, "seed": 2})):
        assert not later.equal(other.ids)


@pytest.mark.parametrize("draw", [batch_at, stream_at])
def test_parts_of_the_rows_make_up_the_batch(draw: Any) -> None:
    data = Tokens.of(np.arange(1000), np.arange(0, 1000, 7))
    for step in range(1, 40):
        whole = draw(data, step, **SHAPE)
        parts = [draw(data, step, **SHAPE, rows=rows) for rows in (slice(0, 4), slice(4, 6))]
        assert whole.ids.equal(torch.cat([part.ids for part in parts]))
        assert whole.resets.equal(torch.cat([part.resets for part in parts]))


def test_where_documents_begin_there_is_a_reset() -> None:
    starts = [0, 5, 40, 41, 199, 300]
    data = Tokens.of(np.arange(16 * 30 + 1), starts)
    found: set[int] = set()
    for step in range(1, 6):
        batch = batch_at(data, step, **SHAPE)
        marks = torch.zeros_like(batch.ids, dtype=torch.bool) if batch.resets is None else batch.resets
        assert marks.equal(torch.isin(batch.ids, torch.tensor(starts)) & (torch.arange(17) > 0))
        found |= set(batch.ids[marks].tolist())
    # All but the first, which begins a window.
    assert found == set(starts[1:])
    plain = batch_at(tokens(1000), 1, **SHAPE)
    assert plain.resets is None


def test_streams_go_on_where_they_ended_and_begin_again_after_the_end() -> None:
    starts = list(range(0, 103, 7))
    data = Tokens.of(np.arange(103), starts)
    steps = [stream_at(data, step, windows=4, context=10, seed=5) for step in range(1, 25)]
    rows = [batch.ids for batch in steps]
    first = min(int(row.min()) for row in rows)
    for before, after in itertools.pairwise(rows):
        goes_on = after[:, 0] == before[:, -1]
        anew = after[:, 0] == first
        assert (goes_on | anew).all()
    # Every stream sees all windows, each once in ten steps, and is reset at the first and at documents alone.
    for row in range(4):
        assert len({int(ids[row, 0]) for ids in rows[:10]}) == 10
    for batch in steps:
        expected = torch.isin(batch.ids, torch.tensor(starts))
        expected[:, 0] |= batch.ids[:, 0] == first
        assert expected.equal(torch.zeros_like(expected) if batch.resets is None else batch.resets)


def test_a_batch_goes_to_a_device() -> None:
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    moved = batch.to(torch.device("meta"))
    assert moved.resets is not None
    assert (moved.ids.device.type, moved.resets.device.type) == ("meta", "meta")
