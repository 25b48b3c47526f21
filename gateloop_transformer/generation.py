"""Decoding with carried state: the prompt in parallel blocks, then one step per token, in constant memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gateloop_transformer.layers.state import TransformerState

Stop = int | Sequence[int | Sequence[int]] | None

# Prompts are read in blocks of this many tokens, so that their logits never exist all at once.
_PROMPT_BLOCK = 2048


class Decoder(Protocol):
    """What generation needs of a model: `Transformer` has it."""

    num_tokens: int
    training: bool

    def __call__(self, ids: Tensor, *, state: TransformerState | None, return_state: bool) -> Any:
        """(logits (B, T, num_tokens), state)."""

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode."""

    def modules(self) -> Iterator[Any]:
        """All modules, each with a flag `training`."""

    def check_vocabulary(self, ids: Tensor) -> None:
        """Raise ValueError if an id is outside the vocabulary."""


_TOP_K = "top_k must be an integer of at least 1"
# Temperatures below it could only overflow on the way to the same choice.
_GREEDY = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits; applied in the order of the fields.

    Attributes:
        repetition_penalty: logits of tokens already in the row are divided by it if positive, multiplied if negative;
            1 changes nothing.
        temperature: logits are divided by it; 0 (or below 1e-6) takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens whose probabilities sum to at least p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1].
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        checks = (
            (self.repetition_penalty > 0, "repetition_penalty must be above 0", self.repetition_penalty),
            (0 <= self.temperature < float("inf"), "temperature must be 0 or more", self.temperature),
            (self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1), _TOP_K, self.top_k),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p must be in [0, 1]", self.min_p),
        )
        for fine, rule, value in checks:
            if not fine:
                raise ValueError(f"{rule}, not {value}")

    def pick(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next token of each row (B,) from logits (B, vocabulary) and a mask of the tokens seen so far."""
        logits = logits.float()
        if not torch.isfinite(logits).all():
            raise RuntimeError("the model gave logits that are not finite; its weights may be damaged")
        if self.repetition_penalty != 1:
            punished = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, punished, logits)
        if self.temperature < _GREEDY:
            return logits.argmax(-1)
        probabilities = self._filter((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    def _filter(self, logits: Tensor) -> Tensor:
        """-inf in place of what top_k, top_p and min_p exclude; the likeliest token always stays."""
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
            excluded = ordered.cumsum(-1) - ordered >= self.top_p
            logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
        if self.min_p is not None:
            probabilities = logits.softmax(-1)
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            logits = logits.masked_fill(probabilities < least, -torch.inf)
        return logits


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


@contextlib.contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back afterwards.

    Walking the modules costs as much as a small layer, so only where the model is training.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
