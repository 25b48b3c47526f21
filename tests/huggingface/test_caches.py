"""transformers' ways to change a cache: right, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kinds import VOCABULARY, build
from transformers import DynamicCache

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def tokens(B: int = 3, T: int = 12) -> torch.Tensor:
    return torch.randint(VOCABULARY, (B, T))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


def test_rows_in_another_order(model: Any) -> None:
    ids, order = tokens(), torch.tensor([2, 0, 0])
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    cache.reorder_cache(order)
    close(model(ids[order, 7:], past_key_values=cache).logits, model(ids[order]).logits[:, 7:])


def test_after_a_reset_a_cache_is_as_new(model: Any) -> None:
    ids, cache = tokens(), DynamicCache(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 7], 1)]
    close(torch.cat(parts, 1), model(ids).logits)
    assert cache.get_seq_length() == 12


def test_a_copy_is_the_way_back(model: Any) -> None:
    ids, cache = tokens(), DynamicCache(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    kept = copy.deepcopy(cache)
    model(tokens(3, 4), past_key_values=cache)
    close(model(ids[:, 7:], past_key_values=kept).logits, model(ids).logits[:, 7:])


@pytest.mark.parametrize("kind", ["attention", "attention window"])
def test_attention_takes_steps_back(kind: str) -> None:
    model = build("attention", **({"attn_window": 5, "rotary_emb": True} if "window" in kind else {}))
    ids, cache = tokens(), DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :7], past_key_values=cache)
    model(tokens(3, 4), past_key_values=cache)
    cache.crop(-4)
    close(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])
    if kind == "attention":
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        more = tokens(2, 3)
        close(
            model(more, past_key_values=cache).logits,
            model(torch.cat([ids[[1, 1]], more], 1)).logits[:, ids.shape[1] :],
        )


@pytest.mark.parametrize("kind", ["polar", "recipe", "hybrid", "released positions"])
def test_a_gate_loop_takes_no_step_back(kind: str) -> None:
    model, ids = build(kind), tokens()
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    # Also where it is recorded from here on, or cropped already.
    for after in (lambda: None, lambda: cache.crop(-2)):
        cache.activate_past_recording()
        after()
        with pytest.raises(ValueError, match="steps of a gate loop cannot be taken back"):
            model(ids[:, 7:], past_key_values=cache)


def test_decayed_keys_cannot_be_cropped() -> None:
    model = build("attention", data_dependent_rel_pos="gate_loop")
    ids, cache = tokens(), DynamicCache(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match="keys are decayed to the last step: such a cache cannot be cropped"):
        model(ids[:, 7:], past_key_values=cache)


def test_both_names_of_a_cache_are_one() -> None:
    model, ids = build("recipe"), tokens()
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(ids[:, :7], cache=one)
    model(ids[:, :7], past_key_values=other)
    for found in (model(ids[:, 7:], cache=other), model(ids[:, 7:], past_key_values=one)):
        close(found.logits, model(ids).logits[:, 7:])
    with pytest.raises(ValueError, match="cache is another name of past_key_values"):
        model(ids, cache=one, past_key_values=other)
