"""Decoding with carried state in constant memory: the prompt in parallel blocks, then one step per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.decoding.beam import beam_search, check_beams
from gateloop_transformer.decoding.decoder import Decoder, evaluating
from gateloop_transformer.decoding.sampling import Sampling
from gateloop_transformer.decoding.speculative import DraftReport, Speculation, check_draft
from gateloop_transformer.layers.state import TransformerState
from gateloop_transformer.ops.context_parallel import refuse

__all__ = ["Decoder", "DraftReport", "Sampling", "Stop", "evaluating", "generate", "stream"]

Stop = int | Sequence[int | Sequence[int]] | None

# Prompts are read in blocks of this many tokens, so that their logits never exist all at once.
_PROMPT_BLOCK = 2048
_SUSPEND = "generate outside of the block, or suspend it: with context_parallel(None)"


def _stop_sequences(stop: Stop, pad: int, num_tokens: int) -> list[list[int]]:
    if stop is None:
        return []
    plain = stop.tolist() if isinstance(stop, Tensor) else stop
    items = [plain] if isinstance(plain, int) else list(plain)
    sequences = [[item] if isinstance(item, int) else list(item) for item in items]
    for sequence in sequences:
        if not sequence or not all(isinstance(token, int) and 0 <= token < num_tokens for token in sequence):
            raise ValueError(f"stop must hold ids in [0, {num_tokens}) or non-empty sequences of them, not {sequence}")
    if sequences and not 0 <= pad < num_tokens:
        raise ValueError(f"pad must be an id in [0, {num_tokens}), not {pad}")
    return sequences


def _generator(generator: torch.Generator | None, seed: int | None, device: torch.device) -> torch.Generator | None:
    if generator is not None and seed is not None:
        raise ValueError("give a generator or a seed, not both")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2**63, 2**64), not {seed}")
    return generator if seed is None else torch.Generator(device).manual_seed(seed)


def _check_prompt(ids: Tensor, max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise ValueError(f"max_new_tokens must be an integer, not {max_new_tokens!r}")
    if not isinstance(ids, Tensor):
        raise ValueError(f"a prompt must be a torch tensor, not {type(ids).__name__}")
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"a prompt must be integers of shape (B, T), not {ids.dtype} {tuple(ids.shape)}")
    if 0 in ids.shape:
        raise ValueError(
            f"a prompt needs at least one row and one token, not shape {tuple(ids.shape)}; "
            "to start from nothing, start from a newline or another token of the data"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")


def _check_mask(model: Decoder, ids: Tensor, mask: Tensor | None) -> None:
    """Check that a mask fits, and that every id that it leaves is in the vocabulary."""
    if mask is None:
        model.check_vocabulary(ids.long())
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
        what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a prompt's mask must be booleans of its shape {tuple(ids.shape)}, not {what}")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"every prompt needs at least one token; the mask leaves none in row {empty[0]}")
    model.check_vocabulary(ids[mask].long())


def _together(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad prompts (T_b,) at their ends to one batch; returns it and its mask."""
    wrong = [n for n, ids in enumerate(prompts) if not isinstance(ids, Tensor) or ids.ndim != 1 or not len(ids)]
    if wrong or not prompts:
        what = f"number {wrong[0]} is not" if wrong else "there is none"
        raise ValueError(f"prompts in a list must be tensors of ids, of shape (T,) with T ≥ 1; {what}")
    lengths = torch.tensor([len(ids) for ids in prompts], device=prompts[0].device)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True), mask


@torch.no_grad()
def _advance(
    model: Decoder, ids: Tensor, state: TransformerState | None, mask: Tensor | None = None
) -> tuple[Tensor, TransformerState]:
    """Read `ids` in evaluation mode: logits after the last token of each row (B, vocabulary), and the state there."""
    # Checked here as well, because a stream may be read outside the block in which it was made, or inside another.
    refuse("generation", _SUSPEND)
    last: Tensor | None = None
    with evaluating(model):
        for start in range(0, ids.shape[1], _PROMPT_BLOCK):
            block = slice(start, start + _PROMPT_BLOCK)
            if mask is None:
                logits, state = model(ids[:, block], state=state, return_state=True)
                last = logits[:, -1]
            else:
                here = mask[:, block]
                logits, state = model(ids[:, block], state=state, return_state=True, mask=here)
                place = torch.where(here, torch.arange(here.shape[1], device=ids.device), -1).amax(1)
                ends = logits[torch.arange(len(ids), device=ids.device), place.clamp(min=0)]
                last = ends if last is None else torch.where((place < 0).unsqueeze(1), last, ends)
    assert state is not None
    assert last is not None
    return last, state


def stream(
    model: Decoder,
    ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    mask: Tensor | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    state: TransformerState | None = None,
    num_beams: int = 1,
    draft: Decoder | None = None,
    draft_tokens: int = 4,
    draft_report: DraftReport | None = None,
) -> Iterator[Tensor]:
    """Yield new tokens (B,) one step at a time; arguments, errors and the end as for `generate`, but no beams."""
    if num_beams != 1:
        raise ValueError("beam search knows its first token only at the end: use generate, or stream with num_beams=1")
    ids, mask = _batch(ids, mask)
    _check_prompt(ids, max_new_tokens)
    _check_mask(model, ids, mask)
    sampling = Sampling(repetition_penalty, 1.0 if temperature is None else temperature, top_k, top_p, min_p)
    stops = _stop_sequences(stop, pad, model.num_tokens)
    drafting = None
    if draft is not None:
        check_draft(model, draft, draft_tokens)
        drafting = _Drafting(draft, draft_tokens, DraftReport() if draft_report is None else draft_report)
    random = _generator(generator, seed, ids.device)
    dtype = _result_dtype(model, ids)
    steps = _stream(model, ids.long(), mask, max_new_tokens, sampling, stops, pad, random, state, drafting)
    return (token.to(dtype) for token in steps)


def _batch(ids: Tensor | Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Put prompts into one tensor, with a mask where they came as a list."""
    refuse("generation", _SUSPEND)
    if not isinstance(ids, (list, tuple)):
        return ids, mask  # type: ignore[return-value]
    if mask is not None:
        raise ValueError("prompts in a list take no mask: each has its own length")
    return _together(ids)


class _Drafting(NamedTuple):
    draft: Decoder
    tokens: int
    report: DraftReport


def _result_dtype(model: Decoder, ids: Tensor) -> torch.dtype:
    """The dtype of ids, or int64 where that is too small to hold every token of the vocabulary."""
    return ids.dtype if torch.iinfo(ids.dtype).max >= model.num_tokens - 1 else torch.long


def _stream(
    model: Decoder,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    stops: list[list[int]],
    pad: int,
    generator: torch.Generator | None,
    state: TransformerState | None,
    drafting: _Drafting | None,
) -> Iterator[Tensor]:
    speculation: Speculation | None = None
    seen = _tokens_in(ids, mask, model.num_tokens)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    longest = max(map(len, stops), default=0)
    tail = ids.new_full((ids.shape[0], longest), -1, dtype=torch.long)
    fed = ids
    for step in range(max_new_tokens):
        if drafting is None or not step:
            logits, state = _advance(model, fed, state, None if step else mask)
            token = sampling.pick(logits, seen, generator)
        else:
            if speculation is None:
                states = state, _advance(drafting.draft, ids, None, mask)[1]
                speculation = Speculation(model, states, *drafting, sampling, generator)
            token = speculation.next(fed[:, 0], seen, done, max_new_tokens - step)
        token = torch.where(done, pad, token)
        seen.scatter_(1, token.unsqueeze(1), True)
        yield token
        if longest:
            tail = torch.cat([tail[:, 1:], token.unsqueeze(1)], 1)
            for sequence in stops:
                wanted = torch.tensor(sequence, device=ids.device)
                done = done | (tail[:, -len(sequence) :] == wanted).all(1)
            if done.all():
                return
        fed = token.unsqueeze(1)


def _tokens_in(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Mark the tokens that each row contains (B, vocabulary)."""
    present = torch.ones_like(ids, dtype=torch.long) if mask is None else mask.long()
    counts = torch.zeros(ids.shape[0], vocabulary, dtype=torch.long, device=ids.device)
    return counts.scatter_add_(1, ids if mask is None else ids.masked_fill(~mask, 0), present) > 0


def generate(
    model: Decoder,
    ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    mask: Tensor | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    state: TransformerState | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    draft: Decoder | None = None,
    draft_tokens: int = 4,
    draft_report: DraftReport | None = None,
) -> Any:
    """Continue each row of `ids`: the prompt in parallel, then one step per token with carried state.

    Meanwhile the model is in evaluation mode, and no gradient is recorded.

    With `num_beams` above 1 the continuation is the best that beam search finds, instead of a drawn one. A hypothesis
    is a continuation; its log-probability is the sum of those of its tokens, and its score is that sum divided by
    (number of tokens) ** length_penalty. At each step every open hypothesis is continued by every token, and of all
    these the `num_beams` of largest log-probability stay, less one for each hypothesis that has ended before. A
    hypothesis ends with a stop sequence. The result is the one of best score among those that ended and those open
    after max_new_tokens.

    With a `draft` the tokens have the same distribution as without one, but each block that the model reads yields
    several: the draft proposes `draft_tokens` tokens, and each is kept with the probability that makes up for the
    difference between the two models. This is faster where the draft is much faster than the model and often agrees
    with it. The same seed gives other tokens than without a draft; temperature 0 gives the same, except for ties
    within rounding.

    Args:
        model: a `Transformer`, or what behaves like one.
        ids: prompts (B, T), integers, B ≥ 1 and T ≥ 1; or a list of prompts of any lengths (T_b,).
        mask: (B, T) booleans, False for padding, on whatever side; None: no row has padding.
        max_new_tokens: most steps to take; 0 returns the prompt.
        temperature: divisor of the logits; 0 takes the likeliest token at each step; None: 1, or 0 with beams.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens whose probabilities sum to at least p.
        min_p: draw from tokens at least min_p times as likely as the likeliest.
        repetition_penalty: above 1 makes tokens already in the row (prompt included) less likely.
        stop: a token id, or a list of ids and of sequences of ids; a row ends with the first of them that appears in
            its new tokens (included in the result), and generation ends when all rows have ended.
        pad: the id that fills rows which ended before others.
        generator: source of randomness, on the device of ids.
        seed: seed of a generator made for this call; not together with `generator`. With neither, torch's default
            generator draws.
        state: continue from here instead of from the start; `ids` then follow what it has read. A draft reads only
            `ids`.
        num_beams: hypotheses that beam search follows; 1: no search.
        length_penalty: exponent of the length in beam search, in [-10, 10]; 0 compares log-probabilities, 1 their
            means over tokens.
        draft: a smaller model of the same vocabulary, on the same device.
        draft_tokens: how many tokens it proposes at a time.
        draft_report: a `DraftReport` that counts what was proposed and what was accepted.

    Returns:
        Prompt and new ids (B, T + steps); for a list, a list of (T_b + its steps,), without padding after the end.

    Raises:
        ValueError: a prompt or the batch is empty, ids are outside the vocabulary, an option is out of range, options
            contradict each other, or the draft has another vocabulary.
        RuntimeError: a logit of the model is NaN or inf, or all logits of a row are -inf; a token whose logit is -inf
            is excluded.

    Source: beams: see `gateloop_transformer.decoding.beam`; drafts: Leviathan et al. (2023), Chen et al. (2023), see
    `gateloop_transformer.decoding.speculative`.
    """
    check_beams(num_beams, length_penalty)
    batch, mask = _batch(ids, mask)
    prompts = ids if isinstance(ids, (list, tuple)) else None
    if num_beams > 1:
        drawing = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p, "min_p": min_p, "draft": draft}
        given = [name for name, value in drawing.items() if value is not None]
        if given:
            raise ValueError(f"beam search draws nothing: with num_beams={num_beams} leave out {', '.join(given)}")
        sampling = Sampling(repetition_penalty, 0.0)
        new = _search(model, batch, mask, max_new_tokens, sampling, stop, pad, state, num_beams, length_penalty)
        return _joined(model, batch, prompts, new, stop, pad)
    steps = stream(
        model,
        batch,
        max_new_tokens,
        mask=mask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        pad=pad,
        generator=generator,
        seed=seed,
        state=state,
        draft=draft,
        draft_tokens=draft_tokens,
        draft_report=draft_report,
    )
    drawn = [token.unsqueeze(1) for token in steps]
    return _joined(model, batch, prompts, torch.cat([batch[:, :0], *drawn], 1), stop, pad)


def _joined(
    model: Decoder, batch: Tensor, prompts: Sequence[Tensor] | None, new: Tensor, stop: Stop, pad: int
) -> Tensor | list[Tensor]:
    """Join prompts and what follows them; in a list, up to where each ended."""
    if prompts is None:
        return torch.cat([batch, new], 1)
    stops = _stop_sequences(stop, pad, model.num_tokens)
    return [torch.cat([ids, row[: _end(row.tolist(), stops)]]) for ids, row in zip(prompts, new, strict=True)]


def _end(tokens: list[int], stops: list[list[int]]) -> int:
    """Count the tokens up to the end of the first stop sequence."""
    ends = [n + 1 for n in range(len(tokens)) for stop in stops if tokens[max(0, n + 1 - len(stop)) : n + 1] == stop]
    return min(ends, default=len(tokens))


def _search(
    model: Decoder,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Stop,
    pad: int,
    state: TransformerState | None,
    num_beams: int,
    length_penalty: float,
) -> Tensor:
    """Find the best continuations by beam search (B, steps)."""
    _check_prompt(ids, max_new_tokens)
    _check_mask(model, ids, mask)
    stops = _stop_sequences(stop, pad, model.num_tokens)
    if not max_new_tokens:
        return ids[:, :0]
    logits, state = _advance(model, ids.long(), state, mask)
    new = beam_search(
        lambda tokens, past: _advance(model, tokens, past),
        logits,
        state,
        _tokens_in(ids.long(), mask, model.num_tokens),
        max_new_tokens,
        num_beams,
        length_penalty=length_penalty,
        stops=stops,
        pad=pad,
        sampling=sampling,
    )
    return new.to(_result_dtype(model, ids))
