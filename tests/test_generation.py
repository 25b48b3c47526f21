"""Generation: greedy equals step-by-step argmax, options do what they say, bad input is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS

from gateloop_transformer import Transformer, generation
from gateloop_transformer.generation import Sampling

KINDS = ["polar", "conv heads", "hybrid", "gate_loop softmax", "norm after"]


def build(name: str = "conv heads") -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        16, num_tokens=31, depth=2, dim_head=8, dropout=0.5 * (name == "norm after"), **MODELS[name]
    ).double()


@pytest.mark.parametrize("name", KINDS)
def test_greedy_equals_argmax_of_the_full_forward(name: str) -> None:
    model = build(name)
    ids = torch.randint(0, 31, (3, 7))
    generated = model.generate(ids, 11, temperature=0)
    model.eval()
    expected = ids
    for _ in range(11):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, expected)


def test_long_prompts_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), torch.randint(0, 31, (1, 50))
    whole = model.generate(ids, 8, temperature=0)
    monkeypatch.setattr("gateloop_transformer.generation._PROMPT_BLOCK", 7)
    assert torch.equal(model.generate(ids, 8, temperature=0), whole)


def test_stream_yields_what_generate_returns() -> None:
    model, ids = build(), torch.randint(0, 31, (2, 5))
    tokens = list(model.stream(ids, 6, seed=3))
    assert torch.equal(torch.stack(tokens, 1), model.generate(ids, 6, seed=3)[:, 5:])


def test_a_seed_repeats_and_a_generator_continues() -> None:
    model, ids = build(), torch.randint(0, 31, (2, 5))
    assert torch.equal(model.generate(ids, 20, seed=1), model.generate(ids, 20, seed=1))
    generator = torch.Generator().manual_seed(1)
    first = model.generate(ids, 20, generator=generator)
    assert torch.equal(first, model.generate(ids, 20, seed=1))
    assert not torch.equal(first, model.generate(ids, 20, generator=generator))


def test_a_seed_leaves_the_default_random_state_alone() -> None:
    model, before = build(), torch.get_rng_state()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_continues_where_it_ended() -> None:
    model, ids = build().eval(), torch.randint(0, 31, (2, 9))
    _, state = model(ids[:, :6], return_state=True)
    rest = model.generate(ids[:, 6:], 5, temperature=0, state=state)
    assert torch.equal(rest, model.generate(ids, 5, temperature=0)[:, 6:])


def test_the_mode_of_the_model_is_restored() -> None:
    model = build("norm after").train()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
    assert model.training


def test_each_module_keeps_its_own_mode() -> None:
    model = build("norm after").train()
    model.layers[0].eval()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
    assert [model.layers[0].training, model.layers[1].training] == [False, True]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.int8, torch.long), (torch.uint8, torch.uint8)])
def test_small_integers_are_kept_where_they_hold_the_vocabulary(dtype: torch.dtype, expected: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Transformer(16, num_tokens=200, depth=1)
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids.to(dtype), 30, seed=1)
    assert out.dtype == expected
    assert torch.equal(out.long(), model.generate(ids, 30, seed=1))


def test_stop_ends_each_row_and_pads_it() -> None:
    model, ids = build(), torch.randint(0, 31, (4, 3))
    free = model.generate(ids, 12, temperature=0)
    stops = [free[0, 5].item(), free[1, 4:6].tolist()]
    stopped = model.generate(ids, 12, temperature=0, stop=stops, pad=30)
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        new = expected[3:]
        ends = [n + 1 for n in range(12) if new[n] == stops[0] or new[max(0, n - 1) : n + 1] == stops[1]]
        end = min(ends, default=12)
        assert row[: 3 + end] == expected[: 3 + end]
        assert all(token == 30 for token in row[3 + end :])


def test_stop_ignores_the_prompt() -> None:
    model = build()
    ids = torch.full((1, 4), 7)
    assert model.generate(ids, 3, temperature=0, stop=[[7, 7, 7, 7]]).shape[1] == 7


def draw(logits: list[float], **options: Any) -> set[int]:
    sampling = Sampling(**options)
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([logits]).expand(500, -1)
    return set(sampling.pick(rows, torch.zeros_like(rows, dtype=torch.bool), generator).tolist())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0}, {0}),
        ({"temperature": 1e-300}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.41}, {0, 1}),
        ({"top_p": 0.75}, {0, 1, 2}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.6}, {0, 1}),
    ],
)
def test_filters_keep_what_they_should(options: dict[str, Any], expected: set[int]) -> None:
    logits = torch.tensor([0.402, 0.298, 0.2, 0.1]).log().tolist()
    assert draw(logits, **options) == expected


def test_repetition_penalty_acts_on_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert Sampling(repetition_penalty=2.0, temperature=0).pick(logits, seen, None).item() == 1
    negative = torch.tensor([[-1.0, -1.5, -9.0]])
    assert Sampling(repetition_penalty=2.0, temperature=0).pick(negative, seen, None).item() == 1


def test_no_new_tokens_returns_the_prompt() -> None:
    ids = torch.randint(0, 31, (2, 5))
    assert torch.equal(build().generate(ids, 0), ids)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one row and one token"),
        (torch.zeros(0, 4, dtype=torch.long), {}, "at least one row and one token"),
        (torch.zeros(4, dtype=torch.long), {}, r"shape \(B, T\)"),
        (torch.zeros(1, 4), {}, "integers"),
        (torch.full((1, 4), 31), {}, r"in \[0, 31\), got 31 to 31"),
        (torch.full((1, 4), -1), {}, r"in \[0, 31\)"),
        (torch.zeros(1, 4, dtype=torch.long), {"temperature": -1.0}, "temperature"),
        (torch.zeros(1, 4, dtype=torch.long), {"temperature": float("nan")}, "temperature"),
        (torch.zeros(1, 4, dtype=torch.long), {"top_k": 0}, "top_k"),
        (torch.zeros(1, 4, dtype=torch.long), {"top_p": 0.0}, "top_p"),
        (torch.zeros(1, 4, dtype=torch.long), {"min_p": 1.5}, "min_p"),
        (torch.zeros(1, 4, dtype=torch.long), {"repetition_penalty": 0.0}, "repetition_penalty"),
        (torch.zeros(1, 4, dtype=torch.long), {"stop": [[]]}, "stop"),
        (torch.zeros(1, 4, dtype=torch.long), {"stop": 31}, "stop"),
        (torch.zeros(1, 4, dtype=torch.long), {"seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_input_is_refused_at_the_call(ids: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().stream(ids, 3, **options)


def test_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        build().generate(torch.zeros(1, 1, dtype=torch.long), -1)


def test_damaged_weights_are_reported() -> None:
    model = build()
    with torch.no_grad():
        model.token_emb.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1)


def ban(model: Transformer, *tokens: int, value: float = -torch.inf) -> Transformer:
    """The model with a hook that gives these tokens that logit."""
    model.to_logits.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), value)
    )
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 3.0, "seed": 0},
        {"top_k": 5, "seed": 0},
        {"top_p": 1.0, "min_p": 0.0, "seed": 0},
        {"repetition_penalty": 1.5, "seed": 0},
        {"num_beams": 4},
        {"draft": True, "seed": 0},
        {"draft": True, "temperature": 0},
    ],
    ids=str,
)
def test_a_token_whose_logit_is_minus_infinity_is_never_taken(options: dict[str, Any]) -> None:
    model, ids = build(), torch.randint(31, (2, 5))
    if "draft" in options:
        # It proposes tokens that the model never takes.
        options = {**options, "draft": build()}
    free = model.generate(ids, 12, **options)[:, 5:].unique().tolist()
    banned = ban(model, *free).generate(ids, 12, **options)[:, 5:]
    assert not set(free) & set(banned.unique().tolist())
    assert (ban(build(), *range(30)).generate(ids, 4, **options)[:, 5:] == 30).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 0}], ids=str)
def test_logits_that_exclude_everything_or_are_too_large_are_refused(options: dict[str, Any]) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="every token is excluded"):
        ban(build(), *range(31)).generate(ids, 2, **options)
    with pytest.raises(RuntimeError, match=r"NaN or inf\); its weights may be damaged"):
        ban(build(), 3, value=torch.inf).generate(ids, 2, **options)


RAGGED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "stop": {"temperature": 0, "stop": [3, [5, 1]], "pad": 2},
    "penalty": {"temperature": 0, "repetition_penalty": 1.7},
    "beams": {"num_beams": 3, "stop": [3]},
}


def ragged_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        16,
        num_tokens=11,
        depth=3,
        dim_head=8,
        heads=2,
        gate_loop_heads=4,
        gate="ring",
        conv_size=4,
        layer_pattern="gate attention",
        rotary_emb=True,
        attn_window=6,
    ).double()


@pytest.mark.parametrize("options", RAGGED.values(), ids=RAGGED)
def test_prompts_of_any_lengths_continue_as_if_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_PROMPT_BLOCK", 4)
    model = ragged_model()
    lengths = (1, 9, 4, 13, 5)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 11, (length,), generator=random) for length in lengths]
    together = model.generate(prompts, 12, **options)
    alone = [model.generate([ids], 12, **options)[0] for ids in prompts]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    assert all(torch.equal(row[: len(ids)], ids) for row, ids in zip(together, prompts, strict=True))
    ids, mask = torch.zeros(5, 13, dtype=torch.long), torch.zeros(5, 13, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, 13 - len(prompt) :], mask[row, 13 - len(prompt) :] = prompt, True
    padded = model.generate(ids, 12, mask=mask, **options)
    assert torch.equal(padded[:, :13], ids)
    for row, prompt in enumerate(prompts):
        new = alone[row][len(prompt) :]
        assert padded[row, 13 : 13 + len(new)].tolist() == new.tolist()


def test_a_draft_continues_prompts_of_any_lengths() -> None:
    model = ragged_model()
    prompts = [torch.randint(0, 11, (length,)) for length in (3, 7, 1)]
    expected = model.generate(prompts, 9, temperature=0)
    drafted = model.generate(prompts, 9, temperature=0, draft=ragged_model(), draft_tokens=3)
    assert [row.tolist() for row in drafted] == [row.tolist() for row in expected]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is none"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], {}, "number 1 is not"),
        ([torch.tensor([[1]])], {}, "number 0 is not"),
        ([[1, 2]], {}, "number 0 is not"),
        ([torch.tensor([1])], {"mask": torch.ones(1, 1, dtype=torch.bool)}, "take no mask"),
        (torch.ones(2, 3, dtype=torch.long), {"mask": torch.ones(2, 3)}, "mask must be booleans of its shape"),
        (
            torch.ones(2, 3, dtype=torch.long),
            {"mask": torch.tensor([[True] * 3, [False] * 3])},
            "the mask leaves none in row 1",
        ),
        ([torch.tensor([99])], {}, r"ids must be in \[0, 11\)"),
    ],
)
def test_wrong_prompts_of_any_lengths_are_refused(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_model().generate(prompts, 3, **options)
