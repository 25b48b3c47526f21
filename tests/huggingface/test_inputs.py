"""Inputs in the forms that transformers and its users have: masks, positions, documents, what is asked for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import needs
from kinds import VOCABULARY, build
from torch import Tensor
from transformers import DynamicCache

from gateloop_transformer.huggingface import GateLoopModel

MASK = torch.ones(3, 12, dtype=torch.long)
MASK[0, :5] = 0
# Documents of 5 and of 7 tokens in a row.
PACKED = torch.cat([torch.arange(5), torch.arange(7)])[None]


def tokens(B: int = 3, T: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


@torch.no_grad()
def test_padding_counts_for_nothing_step_by_step(model: Any) -> None:
    ids, cache = tokens().masked_fill(MASK == 0, 10**6), DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1], attention_mask=MASK[:, : t + 1], past_key_values=cache) for t in range(12)]
    found = torch.cat([step.logits for step in steps], 1)[0, 5:]
    torch.testing.assert_close(found, model(ids[:1, 5:]).logits[0], rtol=1e-4, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    model, ids, found = build("window"), tokens(), []
    for mask in (MASK, MASK.to(dtype)):
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        found.append(model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize(
    "marks",
    [{"position_ids": PACKED}, {"position_ids": PACKED + 2}, {"seq_idx": (torch.arange(12) >= 5).long()[None]}],
    ids=["positions", "positions from 2", "numbers of documents"],
)
def test_documents_are_apart(marks: dict[str, Tensor]) -> None:
    model, ids = build("hybrid"), tokens(1)
    alone = torch.cat([model(part).logits for part in ids.split([5, 7], 1)], 1)
    torch.testing.assert_close(model(ids, **marks).logits, alone, rtol=1e-4, atol=5e-5)


@torch.no_grad()
@needs("torch", "2.7", "what transformers puts around a model does not compile before")
def test_documents_are_apart_when_compiled() -> None:
    model, ids = build("polar", depth=1), tokens(1)
    alone = torch.cat([model(part).logits for part in ids.split([5, 7], 1)], 1)
    run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(ids, position_ids=PACKED, use_cache=False).logits, alone, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_positions_that_go_on_change_nothing(model: Any) -> None:
    ids, cache = tokens(), DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache, position_ids=torch.arange(5)[None])
    rest = model(ids[:, 5:], past_key_values=cache, position_ids=torch.arange(5, 12)[None]).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 5:], rtol=1e-4, atol=5e-5)


def test_marks_of_another_shape_are_refused() -> None:
    model, ids = build("polar"), tokens()
    with pytest.raises(ValueError, match=r"position_ids must have shape \(3, 12\), not \(1, 5\)"):
        model(ids, position_ids=PACKED[:, :5])
    with pytest.raises(ValueError, match=r"seq_idx must have shape \(3, 12\), not \(12,\)"):
        model(ids, seq_idx=torch.zeros(12))


@torch.no_grad()
def test_what_the_configuration_asks_for() -> None:
    model, ids = build("polar"), tokens()
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_no_step_is_kept_that_nobody_asked_for() -> None:
    model, before = build("polar", depth=4), []

    def count(*_: Any) -> None:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_name != "run":
            frame = frame.f_back
        assert frame is not None
        before.append(len(frame.f_locals["hidden"]))

    model.layers[3][0].register_forward_pre_hook(count)
    with torch.no_grad():
        model(tokens())
    assert before == [0]


def test_hidden_states_of_a_generation() -> None:
    model = build("hybrid")
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_hidden_states": True}
    found = model.generate(tokens(), attention_mask=MASK, do_sample=False, output_scores=True, **options)
    shapes = [[tuple(each.shape) for each in step] for step in found.hidden_states]
    assert shapes == [[(3, 12, 16)] * 3, *[[(3, 1, 16)] * 3] * 2]
    assert [tuple(each.shape) for each in found.scores] == [(3, VOCABULARY)] * 3
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert model.generate(tokens(), attention_mask=MASK, **beams, **options).hidden_states[1][0].shape == (9, 1, 16)


def test_models_say_what_they_take() -> None:
    names = set(inspect.signature(GateLoopModel.forward).parameters)
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds"} <= names
