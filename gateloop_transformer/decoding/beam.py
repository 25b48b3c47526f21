"""Beam search: the likeliest continuation among the few that are followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gateloop_transformer.decoding.sampling import Sampling
from gateloop_transformer.layers.state import TransformerState

# Maps tokens (B, 1) and the state before them to the logits after them (B, vocabulary) and the state there.
Advance = Callable[[Tensor, TransformerState], tuple[Tensor, TransformerState]]


def check_beams(num_beams: int, length_penalty: float) -> None:
    """Check the options of beam search.

    Raises:
        ValueError: one of them is out of range.
    """
    if not isinstance(num_beams, int) or isinstance(num_beams, bool) or num_beams < 1:
        raise ValueError(f"num_beams must be an integer of at least 1, not {num_beams!r}")
    if not isinstance(length_penalty, (int, float)) or not -10 <= length_penalty <= 10:
        raise ValueError(f"length_penalty must be in [-10, 10], not {length_penalty!r}")


def beam_search(
    advance: Advance,
    logits: Tensor,
    state: TransformerState,
    seen: Tensor,
    steps: int,
    num_beams: int,
    *,
    length_penalty: float = 1.0,
    stops: Sequence[Sequence[int]] = (),
    pad: int = 0,
    sampling: Sampling | None = None,
) -> Tensor:
    """Find the best continuation of each row.

    A hypothesis is a continuation; its log-probability is the sum of those of its tokens, and its score is that sum
    divided by (number of tokens) ** length_penalty. At first there is only the empty one. At each step every open
    hypothesis is continued by every token, and of all these the `num_beams` of largest log-probability stay, less one
    for each hypothesis that has ended before. A hypothesis ends where its tokens end in a stop sequence. The result is
    the one of best score among those that ended and those still open after `steps` tokens; among equal ones, it is the
    first to end.

    One beam is greedy decoding. A row ends early only where no open hypothesis can reach the best score anymore.

    Args:
        advance: the model.
        logits: logits after the prompts (B, vocabulary).
        state: state after the prompts.
        seen: the tokens in the prompts (B, vocabulary), boolean, for the repetition penalty.
        steps: most tokens of a hypothesis, at least 1.
        num_beams: hypotheses of each row.
        length_penalty: above 0 prefers longer hypotheses, below 0 shorter ones; 1 compares means over tokens.
        stops: sequences of ids that end a hypothesis, and belong to it.
        pad: the id that follows a hypothesis that ended.
        sampling: the settings whose repetition penalty is applied before logits become log-probabilities.

    Returns:
        New tokens (B, at most steps).

    Source: Graves, Sequence Transduction with Recurrent Neural Networks (2012); with ended hypotheses taken from the
    beam as by Sutskever et al. (2014), and scores divided by length as by Wu et al. (2016) without their constant.
    """
    sampling = Sampling() if sampling is None else sampling
    rows, vocabulary = logits.shape
    best: list[tuple[float, list[int]]] = [(-math.inf, [])] * rows
    open_rows = torch.arange(rows, device=logits.device)
    ended = torch.zeros(rows, dtype=torch.long, device=logits.device)
    # There is one hypothesis at first: its copies have probability 0.
    sums = logits.new_full((rows, num_beams), -math.inf, dtype=torch.float64)
    sums[:, 0] = 0
    tokens = torch.empty(rows, num_beams, 0, dtype=torch.long, device=logits.device)
    logits, seen = (each.repeat_interleave(num_beams, 0) for each in (logits, seen))
    state = state.repeat(num_beams)
    for length in range(1, steps + 1):
        chances = sampling.penalised(logits.double(), seen).log_softmax(-1).unflatten(0, (-1, num_beams))
        sums, chosen = (sums.unsqueeze(-1) + chances).flatten(1).topk(num_beams)
        beams, token = chosen // vocabulary, chosen % vocabulary
        tokens = torch.cat([tokens.gather(1, beams.unsqueeze(-1).expand_as(tokens)), token.unsqueeze(-1)], -1)
        width = num_beams - ended[open_rows].unsqueeze(1)
        sums = sums.masked_fill(torch.arange(num_beams, device=sums.device) >= width, -math.inf)
        ends = _ends(tokens, stops) & sums.isfinite() if length < steps else sums.isfinite()
        for place, beam in ends.nonzero().tolist():
            row, score = int(open_rows[place]), sums[place, beam].item() / length**length_penalty
            ended[row] += 1
            if score > best[row][0]:
                best[row] = score, tokens[place, beam].tolist()
        sums = sums.masked_fill(ends, -math.inf)
        # A sum only falls: this is the best score that an open hypothesis can still reach.
        reach = sums.amax(1) / (steps if length_penalty > 0 else length + 1) ** length_penalty
        going = reach > torch.tensor([score for score, _ in best], device=sums.device)[open_rows]
        if not going.any():
            break
        kept = beams + num_beams * torch.arange(len(open_rows), device=sums.device).unsqueeze(1)
        open_rows, sums, tokens, kept, token = (each[going] for each in (open_rows, sums, tokens, kept, token))
        seen = seen[kept.flatten()].scatter(1, token.flatten().unsqueeze(1), True)
        logits, state = advance(token.flatten().unsqueeze(1), state.select(kept.flatten()))
    longest = max(len(found) for _, found in best)
    padded = [found + [pad] * (longest - len(found)) for _, found in best]
    return torch.tensor(padded, dtype=torch.long, device=logits.device)


def _ends(tokens: Tensor, stops: Sequence[Sequence[int]]) -> Tensor:
    """Mark the hypotheses (B, beams, length) that end in a stop sequence (B, beams)."""
    ends = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for stop in stops:
        if len(stop) <= tokens.shape[-1]:
            ends |= (tokens[..., -len(stop) :] == tokens.new_tensor(stop)).all(-1)
    return ends
