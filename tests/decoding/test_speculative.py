"""Speculative decoding: the same text when greedy, the same distribution when drawn; refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor

from gateloop_transformer import Transformer
from gateloop_transformer.decoding.sampling import Sampling
from gateloop_transformer.decoding.speculative import count_accepted, residual
from gateloop_transformer.generation import DraftReport, generate
from gateloop_transformer.layers.state import SimpleGateLoopState, TransformerState

VOCABULARY, STEPS = 5, 3
KINDS = ["conv heads", "hybrid"]


def build(name: str = "hybrid", vocabulary: int = 7, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(8, num_tokens=vocabulary, depth=2, dim_head=4, **MODELS[name]).double()
    with torch.no_grad():
        model.to_logits[1].weight *= 3
        # Next to the embedding of the last token, what came before must weigh something.
        model.token_emb.weight *= 0.2
    return model


def like(model: Transformer, noise: float) -> Transformer:
    """A draft that is often of the model's opinion."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.to_logits[1].weight += noise * torch.randn_like(other.to_logits[1].weight)
    return other


def test_acceptance_has_the_probability_of_the_formula() -> None:
    p = torch.tensor([0.1, 0.6, 0.3, 0.0]).double()
    q = torch.tensor([0.4, 0.2, 0.1, 0.3]).double()
    uniform = (torch.arange(10_000).double() + 0.5) / 10_000
    for token in range(4):
        rows = [each.expand(10_000, 1, 4) for each in (p, q)]
        accepted = count_accepted(*rows, torch.full((10_000, 1), token), uniform.unsqueeze(1))
        assert accepted.double().mean().item() == pytest.approx(min(1.0, (p[token] / q[token]).item()), abs=1e-4)


def test_what_is_accepted_and_what_replaces_the_rest_are_the_model_s_probabilities() -> None:
    for _ in range(20):
        p, q = torch.rand(2, 5, dtype=torch.float64).softmax(-1)
        accepted = torch.minimum(p, q)
        assert torch.allclose(accepted + (1 - accepted.sum()) * residual(p, q), p, atol=1e-14)
    assert residual(p, q).sum().item() == pytest.approx(1)
    assert torch.equal(residual(p, p), p)


def test_tokens_count_up_to_the_first_that_is_refused() -> None:
    p, q = torch.tensor([0.5, 0.5]).expand(4, 3, 2), torch.tensor([0.9, 0.1]).expand(4, 3, 2)
    drafted = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
    uniform = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.9], [0.9, 0.9, 0.9], [0.5, 0.55, 0.56]])
    assert count_accepted(p, q, drafted, uniform).tolist() == [0, 2, 3, 2]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_equals_greedy_without_a_draft(name: str, noise: float, tokens: int, penalty: float) -> None:
    model = build(name)
    draft, ids = like(model, noise), torch.randint(7, (3, 5))
    for rows in (ids[:1], ids):
        options: dict[str, Any] = {"temperature": 0, "repetition_penalty": penalty}
        report = DraftReport()
        out = model.generate(rows, 23, draft=draft, draft_tokens=tokens, draft_report=report, **options)
        assert torch.equal(out, model.generate(rows, 23, **options))
        assert noise or report.rate == 1
        assert report.drafted <= rows.shape[0] * tokens * report.blocks


def test_stop_sequences_end_rows_as_without_a_draft() -> None:
    model, ids = build("conv heads", 7), torch.randint(7, (4, 3))
    free = model.generate(ids, 12, temperature=0)
    stops = [free[0, 5].item(), free[1, 4:6].tolist()]
    options: dict[str, Any] = {"temperature": 0, "stop": stops, "pad": 6}
    for noise in (0.0, 0.5):
        out = model.generate(ids, 12, draft=like(model, noise), draft_tokens=5, **options)
        assert torch.equal(out, model.generate(ids, 12, **options))


class Table(torch.nn.Module):
    """A fast decoder: logits from the last two tokens, looked up."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.num_tokens = VOCABULARY
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.2 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)

    def forward(self, ids: Tensor, *, state: Any = None, return_state: bool = True) -> Any:
        before = torch.zeros(ids.shape[0], 1) if state is None else state.layers[0].hidden
        both = torch.cat([before.long(), ids], 1)
        logits = self.table[both[:, :-1], both[:, 1:]]
        return logits, TransformerState((SimpleGateLoopState(ids[:, -1:].float()),))

    def check_vocabulary(self, ids: Tensor) -> None:
        assert int(ids.max()) < VOCABULARY


def exact(model: Table, prompt: Tensor, steps: int, sampling: Sampling) -> Tensor:
    """The probability of every continuation of `steps` tokens: (vocabulary,) * steps."""
    vocabulary = model.num_tokens
    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * steps)
    chance = torch.ones(len(every))
    for step in range(steps):
        read = torch.cat([prompt.expand(len(every), -1), every[:, :step]], 1)
        seen = torch.zeros(len(every), vocabulary, dtype=torch.bool).scatter(1, read, True)
        probabilities = sampling.probabilities(model(read)[0][:, -1], seen)
        chance = chance * probabilities.gather(1, every[:, step : step + 1]).squeeze(1)
    return chance.reshape([vocabulary] * steps)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"temperature": 1.4, "top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2, "repetition_penalty": 1.6},
    "all": {"temperature": 1.2, "top_k": 4, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.3},
}
DRAWS = 2000


def chance_of(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square test: how likely counts at least as far from `probabilities` are; rare outcomes pooled."""
    assert counts[probabilities == 0].sum() == 0, "an outcome of probability 0 was drawn"
    expected = (probabilities / probabilities.sum() * counts.sum()).double()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum().unsqueeze(0)]) for x in (counts.double(), expected))
    terms = ((counts - expected).square() / expected)[expected > 0]
    return torch.special.gammaincc(torch.tensor((len(terms) - 1) / 2).double(), terms.sum() / 2).item()


def drawn(model: Table, draft: Table, prompt: Tensor, rows: int, **options: Any) -> tuple[Tensor, float]:
    """How often each continuation came, and the rate of acceptance. Rows are draws of their own."""
    generator, report = torch.Generator().manual_seed(0), DraftReport()
    counts = torch.zeros(VOCABULARY**STEPS)
    weights = torch.tensor([VOCABULARY**place for place in reversed(range(STEPS))])
    for _ in range(DRAWS // rows):
        ids = prompt.expand(rows, -1)
        out = generate(
            model, ids, STEPS, draft=draft, draft_tokens=2, draft_report=report, generator=generator, **options
        )
        codes = (out[:, prompt.shape[1] :] * weights).sum(1)
        counts += torch.bincount(codes, minlength=VOCABULARY**STEPS)
    return counts.reshape([VOCABULARY] * STEPS), report.rate


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_that_of_the_model_alone(name: str, rows: int) -> None:
    model, draft, prompt = Table(1), Table(2), torch.tensor([[1, 2]])
    probabilities = exact(model, prompt, STEPS, Sampling(**OPTIONS[name]))
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    counts, rate = drawn(model, draft, prompt, rows, **OPTIONS[name])
    assert 0.1 < rate < 0.95
    assert chance_of(counts, probabilities) > 1e-3
    # The test would tell: this is what the draft alone gives.
    alone = exact(draft, prompt, STEPS, Sampling())
    assert chance_of(alone * DRAWS, exact(model, prompt, STEPS, Sampling())) < 1e-30


def test_stream_yields_what_generate_returns() -> None:
    model, ids = build(), torch.randint(7, (2, 5))
    draft = like(model, 0.5)
    tokens = list(model.stream(ids, 11, seed=3, draft=draft))
    assert torch.equal(torch.stack(tokens, 1), model.generate(ids, 11, seed=3, draft=draft)[:, 5:])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_no_more_than_the_wanted_tokens_come(steps: int) -> None:
    model, ids = build(), torch.randint(7, (2, 5))
    assert model.generate(ids, steps, draft=like(model, 0.0), draft_tokens=4).shape == (2, 5 + steps)


def test_a_state_continues_where_it_ended() -> None:
    model, ids = build().eval(), torch.randint(7, (2, 9))
    _, state = model(ids[:, :6], return_state=True)
    rest = model.generate(ids[:, 6:], 7, temperature=0, state=state, draft=like(model, 0.3))
    assert torch.equal(rest, model.generate(ids, 7, temperature=0)[:, 6:])


def test_greedy_leaves_the_default_random_state_alone() -> None:
    model, before = build(), torch.get_rng_state()
    draft = like(model, 0.5)
    before = torch.get_rng_state()
    model.generate(torch.zeros(2, 1, dtype=torch.long), 9, temperature=0, draft=draft)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_report_adds_up() -> None:
    model = build()
    report = DraftReport()
    assert report.rate == 0
    model.generate(torch.zeros(1, 2, dtype=torch.long), 13, draft=like(model, 0.0), draft_tokens=3, draft_report=report)
    # The prompt gives one token, each block of 3 accepted ones another.
    assert (report.blocks, report.drafted, report.accepted, report.rate) == (3, 9, 9, 1.0)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_drafted_is_what_the_draft_would_say_to_the_text_so_far(name: str) -> None:
    model, ids, report = build(name, 41).eval(), torch.randint(41, (1, 4)), DraftReport()
    draft = like(model, 0.25)
    greedy: dict[str, Any] = {"temperature": 0, "repetition_penalty": 3.0}
    text = model.generate(ids, 40, **greedy, draft=draft, draft_tokens=3, draft_report=report)
    place, accepted, blocks = 5, 0, 0
    while place < 44:
        count = min(3, 43 - place)
        guess = draft.generate(text[:, :place], count, **greedy)[0, place:]
        kept = int((guess == text[0, place : place + count]).long().cumprod(0).sum())
        accepted, blocks, place = accepted + kept, blocks + bool(count), place + kept + 1
    assert 0.1 < report.rate < 0.9
    assert (report.accepted, report.blocks) == (accepted, blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": 3}, "draft must be a model such as Transformer, not int"),
        ({"draft": build("conv heads", 9)}, "vocabulary of 7 tokens, not 9"),
        ({"draft": build("conv heads", 7), "draft_tokens": 0}, "draft_tokens must be an integer of at least 1, not 0"),
        ({"draft": build("conv heads", 7), "draft_tokens": 2.0}, "draft_tokens"),
        ({"draft": build("conv heads", 7), "num_beams": 2}, "use generate"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().stream(torch.zeros(1, 2, dtype=torch.long), 3, **options)
