"""History: after any feeding and going back, the state is that of reading what is left from the start."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor

from gateloop_transformer import History, Transformer

KINDS = ["conv heads", "hybrid", "gate_loop softmax"]


def build(name: str = "hybrid") -> Transformer:
    torch.manual_seed(0)
    return Transformer(8, num_tokens=11, depth=2, dim_head=4, **MODELS[name]).double()


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for item in state for x in leaves(item)]


def same(state: Any, expected: Any) -> bool:
    pairs = zip(leaves(state), leaves(expected), strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in pairs)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keep", [1, 5])
def test_any_walk_ends_where_reading_what_is_left_ends(name: str, keep: int) -> None:
    model, chance = build(name).eval(), random.Random(keep)
    history, read = History(model, keep), torch.empty(2, 0, dtype=torch.long)
    furthest = 0
    for _ in range(60):
        if chance.random() < 0.6:
            ids = torch.randint(11, (2, chance.choice([1, 1, 2, 3, 9])))
            logits = history.feed(ids)
            read = torch.cat([read, ids], 1)
            torch.testing.assert_close(logits, model(read)[:, -ids.shape[1] :], rtol=1e-10, atol=1e-12)
            furthest = max(furthest, read.shape[1])
            assert history.available >= read.shape[1] - max(0, furthest - keep)
        else:
            count = chance.randint(0, min(history.available, keep))
            history.back(count)
            read = read[:, : read.shape[1] - count]
        if chance.random() < 0.3 and read.shape[1]:
            assert same(history.state, model(read, return_state=True)[1])


def test_back_to_where_a_call_ended_is_that_state_to_the_bit() -> None:
    history = History(build("conv heads"), 4)
    states = []
    for _ in range(4):
        history.feed(torch.randint(11, (1, 1)))
        states.append(history.state)
    for expected in reversed(states[:-1]):
        history.back(1)
        assert all(x is y for x, y in zip(leaves(history.state), leaves(expected), strict=True))
    history.back(1)
    assert history.state is None


def test_memory_does_not_grow_with_the_length() -> None:
    history = History(build("conv heads"), 6)
    for step in range(50):
        history.feed(torch.randint(11, (1, 1 + step % 13)))
        if step % 3 == 2:
            history.back(2)
        assert len(history._reads) <= 6
        assert history.available <= 12


def test_attention_keeps_its_past_once_for_all_states() -> None:
    history = History(build("hybrid"), 5)
    for _ in range(9):
        history.feed(torch.randint(11, (1, 1)))
    newest: Any = history.state
    for read in history._reads:
        before: Any = read.before
        assert before.layers[1].keys.data_ptr() == newest.layers[1].keys.data_ptr()
        assert before.layers[1].values.data_ptr() == newest.layers[1].values.data_ptr()


def test_a_copy_goes_its_own_way() -> None:
    model, ids = build().eval(), torch.randint(11, (1, 6))
    history = History(model, 3)
    history.feed(ids)
    history.back(1)
    other = history.copy()
    other.back(1)
    other.feed(ids[:, :2])
    assert same(history.state, model(ids[:, :5], return_state=True)[1])
    assert same(other.state, model(torch.cat([ids[:, :4], ids[:, :2]], 1), return_state=True)[1])


def test_a_history_starts_from_a_state_and_never_goes_behind_it() -> None:
    model, ids = build().eval(), torch.randint(11, (2, 8))
    _, state = model(ids[:, :5], return_state=True)
    history = History(model, 4, state)
    torch.testing.assert_close(history.feed(ids[:, 5:]), model(ids)[:, 5:])
    history.back(3)
    assert same(history.state, state)
    with pytest.raises(ValueError, match="can go back 0 to 0 tokens, not 1"):
        history.back(1)


def test_the_model_is_put_back_in_its_mode_and_records_nothing() -> None:
    model = build().train()
    assert not History(model, 2).feed(torch.zeros(1, 3, dtype=torch.long)).requires_grad
    assert model.training


def test_what_is_refused_changes_nothing() -> None:
    model, ids = build().eval(), torch.randint(11, (2, 6))
    history = History(model, 4)
    history.feed(ids)
    history.back(1)
    for bad in (torch.full((2, 1), 11), torch.full((2, 9), 11), torch.zeros(3, 1, dtype=torch.long)):
        with pytest.raises(ValueError):  # noqa: PT011
            history.feed(bad)
    for count in (-1, 99, 1.0, True):
        with pytest.raises(ValueError, match="can go back"):
            history.back(count)  # type: ignore[arg-type]
    assert same(history.state, model(ids[:, :5], return_state=True)[1])


@pytest.mark.parametrize("keep", [0, -1, 2.0, True, None])
def test_keep_must_be_a_count(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep must be an integer of at least 1"):
        History(build(), keep)


@pytest.mark.parametrize("ids", [[[1]], torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)])
def test_feeding_something_else_is_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match="feed takes ids of shape"):
        History(build(), 2).feed(ids)
