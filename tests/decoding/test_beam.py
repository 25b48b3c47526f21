"""Beam search equals its definition, written plainly; one beam is greedy decoding; contradictions are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import MODELS

from gateloop_transformer import Transformer

KINDS = ["conv heads", "hybrid"]
VOCABULARY = 7


def build(name: str = "hybrid") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(8, num_tokens=VOCABULARY, depth=2, dim_head=4, **MODELS[name]).double()
    with torch.no_grad():
        model.to_logits[1].weight *= 4
        # Next to the embedding of the last token, what came before must weigh something.
        model.token_emb.weight *= 0.2
    return model


def reference(
    model: Transformer,
    prompt: list[int],
    steps: int,
    beams: int,
    power: float = 1.0,
    stops: tuple[tuple[int, ...], ...] = (),
    penalty: float = 1.0,
) -> list[int]:
    """The definition: hypotheses as lists, each read from the start at every step, all steps taken."""
    model.eval()
    found: list[tuple[float, list[int]]] = []
    followed: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        candidates = []
        for total, tokens in followed:
            logits = model(torch.tensor([prompt + tokens]))[0, -1]
            for token in set(prompt + tokens):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            chances = logits.log_softmax(-1).tolist()
            candidates += [(total + chance, [*tokens, token]) for token, chance in enumerate(chances)]
        candidates.sort(key=lambda each: -each[0])
        followed = []
        for total, tokens in candidates[: beams - len(found)]:
            if any(tuple(tokens[-len(stop) :]) == stop for stop in stops):
                found.append((total / len(tokens) ** power, tokens))
            else:
                followed.append((total, tokens))
    found += [(total / len(tokens) ** power, tokens) for total, tokens in followed]
    return max(found, key=lambda each: each[0])[1]


STOPS = ((3,), (1, 2), (5, 5, 0))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize(("stops", "penalty"), [((), 1.0), (STOPS, 1.0), (STOPS, 1.7)])
def test_beam_search_equals_its_definition(
    name: str, beams: int, power: float, stops: tuple[tuple[int, ...], ...], penalty: float
) -> None:
    model, ids = build(name), torch.randint(VOCABULARY, (4, 5))
    out = model.generate(
        ids, 8, num_beams=beams, length_penalty=power, stop=list(stops), pad=6, repetition_penalty=penalty
    )
    assert torch.equal(out[:, :5], ids)
    for row, prompt in zip(out[:, 5:].tolist(), ids.tolist(), strict=True):
        expected = reference(model, prompt, 8, beams, power, stops, penalty)
        assert row == expected + [6] * (len(row) - len(expected))


def test_the_cases_end_at_different_lengths_for_different_powers() -> None:
    model, prompt = build(), [1, 4, 2]
    lengths = {len(reference(model, prompt, 6, 5, power, STOPS)) for power in (-10.0, 10.0)}
    assert len(lengths) == 2


def test_enough_beams_find_the_likeliest_of_all_continuations() -> None:
    model, ids = build().eval(), torch.randint(VOCABULARY, (1, 4))
    every = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * 3)
    whole = torch.cat([ids.expand(len(every), -1), every], 1)
    chances = model(whole).log_softmax(-1)[:, 3:-1].gather(-1, every.unsqueeze(-1)).sum((1, 2))
    assert torch.equal(model.generate(ids, 3, num_beams=VOCABULARY**2)[0, 4:], every[chances.argmax()])


def test_one_beam_is_greedy_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateloop_transformer import generation
    from gateloop_transformer.decoding.sampling import Sampling

    model, ids = build(), torch.randint(VOCABULARY, (3, 4))
    greedy = model.generate(ids, 9, temperature=0, stop=[3], num_beams=1)
    new = generation._search(model, ids, None, 9, Sampling(temperature=0.0), [3], 0, None, 1, 1.0)
    assert torch.equal(torch.cat([ids, new], 1), greedy)


def test_a_search_ends_where_no_open_hypothesis_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), torch.randint(VOCABULARY, (1, 4))
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *given, **named: calls.append(1) or forward(*given, **named))
    likeliest = int(model.eval()(ids)[0, -1].argmax())
    calls.clear()
    assert model.generate(ids, 500, num_beams=4, length_penalty=0.0, stop=likeliest).shape[1] == 5
    assert len(calls) < 30


def test_a_search_continues_a_state() -> None:
    model, ids = build().eval(), torch.randint(VOCABULARY, (2, 6))
    _, state = model(ids[:, :4], return_state=True)
    whole = model.generate(ids, 5, num_beams=3)
    assert torch.equal(model.generate(ids[:, 4:], 5, num_beams=3, state=state), whole[:, 4:])


def test_small_integers_and_no_steps() -> None:
    model, ids = build(), torch.randint(VOCABULARY, (2, 3), dtype=torch.uint8)
    assert model.generate(ids, 4, num_beams=2).dtype == torch.uint8
    assert torch.equal(model.generate(ids, 0, num_beams=2), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer of at least 1, not 0"),
        ({"num_beams": 2.0}, "num_beams"),
        ({"num_beams": True}, "num_beams"),
        ({"num_beams": 2, "length_penalty": math.inf}, "length_penalty"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty"),
        ({"num_beams": 2, "length_penalty": "1"}, "length_penalty"),
        ({"num_beams": 2, "temperature": 0.8}, "num_beams=2 leave out temperature"),
        ({"num_beams": 2, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, "leave out top_k, top_p, min_p"),
        ({"num_beams": 2, "draft": object()}, "leave out draft"),
        ({"num_beams": 2, "stop": [3], "pad": 99}, "pad must be an id"),
        ({"num_beams": 2, "stop": [99]}, "stop must hold ids"),
        ({"num_beams": 2, "repetition_penalty": -1.0}, "repetition_penalty"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().generate(torch.zeros(1, 2, dtype=torch.long), 3, **options)


def test_beams_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="stream with num_beams=1"):
        build().stream(torch.zeros(1, 2, dtype=torch.long), 3, num_beams=2)


def test_damaged_weights_are_reported() -> None:
    model = build()
    with torch.no_grad():
        model.token_emb.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2, num_beams=2)
