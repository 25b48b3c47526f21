"""Decoding with carried state: the prompt in parallel blocks, then one step per token, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gateloop_transformer.decoding.decoder import Decoder, evaluating
from gateloop_transformer.decoding.sampling import Sampling
from gateloop_transformer.layers.state import TransformerState

__all__ = ["Decoder", "Sampling", "Stop", "evaluating", "generate", "stream"]

Stop = int | Sequence[int | Sequence[int]] | None

# Prompts are read in blocks of this many tokens, so that their logits never exist all at once.
_PROMPT_BLOCK = 2048


def _stop_sequences(stop: Stop, num_tokens: int) -> list[list[int]]:
    if stop is None:
        return []
    plain = stop.tolist() if isinstance(stop, Tensor) else stop
    items = [plain] if isinstance(plain, int) else list(plain)
    sequences = [[item] if isinstance(item, int) else list(item) for item in items]
    for sequence in sequences:
        if not sequence or not all(isinstance(token, int) and 0 <= token < num_tokens for token in sequence):
            raise ValueError(f"stop must hold ids in [0, {num_tokens}) or non-empty sequences of them, not {sequence}")
    return sequences


def _generator(generator: torch.Generator | None, seed: int | None, device: torch.device) -> torch.Generator | None:
    if generator is not None and seed is not None:
        raise ValueError("give a generator or a seed, not both")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2**63, 2**64), not {seed}")
    return generator if seed is None else torch.Generator(device).manual_seed(seed)


def _check_prompt(model: Decoder, ids: Tensor, max_new_tokens: int) -> None:
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
    model.check_vocabulary(ids.long())


@torch.no_grad()
def _advance(model: Decoder, ids: Tensor, state: TransformerState | None) -> tuple[Tensor, TransformerState]:
    """Logits after the last of `ids` (B, vocabulary), and the state there. In evaluation mode."""
    with evaluating(model):
        for block in ids.split(_PROMPT_BLOCK, dim=1):
            logits, state = model(block, state=state, return_state=True)
    assert state is not None
    return logits[:, -1], state


def stream(
    model: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    state: TransformerState | None = None,
) -> Iterator[Tensor]:
    """Yield new tokens (B,) one step at a time; arguments, errors and the end as in `generate`."""
    _check_prompt(model, ids, max_new_tokens)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    stops = _stop_sequences(stop, model.num_tokens)
    if stops and not 0 <= pad < model.num_tokens:
        raise ValueError(f"pad must be an id in [0, {model.num_tokens}), not {pad}")
    random = _generator(generator, seed, ids.device)
    # An integer type too small for the vocabulary cannot hold what is generated.
    dtype = ids.dtype if torch.iinfo(ids.dtype).max >= model.num_tokens - 1 else torch.long
    steps = _stream(model, ids.long(), max_new_tokens, sampling, stops, pad, random, state)
    return (token.to(dtype) for token in steps)


def _stream(
    model: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stops: list[list[int]],
    pad: int,
    generator: torch.Generator | None,
    state: TransformerState | None,
) -> Iterator[Tensor]:
    seen = torch.zeros(ids.shape[0], model.num_tokens, dtype=torch.bool, device=ids.device)
    seen.scatter_(1, ids, True)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    longest = max(map(len, stops), default=0)
    tail = ids.new_full((ids.shape[0], longest), -1, dtype=torch.long)
    fed = ids
    for _ in range(max_new_tokens):
        logits, state = _advance(model, fed, state)
        token = sampling.pick(logits, seen, generator)
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


def generate(
    model: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    state: TransformerState | None = None,
) -> Tensor:
    """Continue each row of `ids`: the prompt in parallel, then one step per token with carried state.

    The model is put in evaluation mode meanwhile; no gradient is recorded.

    Args:
        model: a `Transformer`, or what behaves like one.
        ids: prompts (B, T), integers, B ≥ 1 and T ≥ 1, all rows of one length.
        max_new_tokens: at most this many steps; 0 returns the prompt.
        temperature: 0 takes the likeliest token at each step.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens whose probabilities sum to at least p.
        min_p: draw from tokens at least min_p times as likely as the likeliest.
        repetition_penalty: above 1 makes tokens already in the row (prompt included) less likely.
        stop: a token id, or a list of ids and of sequences of ids; a row ends with the first of them that appears in
            its new tokens (included in the result), and generation ends when all rows have.
        pad: the id that fills rows which ended before others.
        generator: source of randomness, on the device of ids.
        seed: of a generator made for this call; not together with `generator`. With neither, torch's default.
        state: continue from here instead of from the start; `ids` then follow what it has read.

    Returns:
        Prompt and new ids (B, T + steps).

    Raises:
        ValueError: an empty prompt or batch, ids outside the vocabulary, or an option without a meaning.
        RuntimeError: the model's logits are not finite.
    """
    steps = stream(
        model,
        ids,
        max_new_tokens,
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
    )
    return torch.cat([ids, *(token.unsqueeze(1) for token in steps)], 1)
