"""Speculative decoding: a small model drafts tokens, the large one reads them at once and keeps what it would draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gateloop_transformer.decoding.decoder import Decoder
from gateloop_transformer.decoding.history import History
from gateloop_transformer.decoding.sampling import Sampling
from gateloop_transformer.layers.state import TransformerState


@dataclass
class DraftReport:
    """Counts of drafted and accepted tokens; every generation that is given the report adds to it.

    Attributes:
        blocks: how many times the large model read a block of drafted tokens.
        drafted: tokens that the draft proposed, in all rows that had not ended.
        accepted: those of them that became part of the text.
    """

    blocks: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Accepted tokens per drafted token; 0 where nothing was drafted."""
        return self.accepted / max(1, self.drafted)


def check_draft(model: Decoder, draft: Decoder, tokens: int) -> None:
    """Check that the draft can propose tokens to the model.

    Raises:
        ValueError: the draft is not a model or has another vocabulary, or tokens is not an integer of at least 1.
    """
    size = getattr(draft, "num_tokens", None)
    if size is None:
        raise ValueError(f"draft must be a model such as Transformer, not {type(draft).__name__}")
    if size != model.num_tokens:
        raise ValueError(f"draft must have the model's vocabulary of {model.num_tokens} tokens, not {size}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"draft_tokens must be an integer of at least 1, not {tokens!r}")


def count_accepted(p: Tensor, q: Tensor, drafted: Tensor, uniform: Tensor) -> Tensor:
    """Count the leading drafted tokens to keep: each with probability min(1, p/q), up to the first refused one.

    Args:
        p: the large model's probabilities where each token was drafted (B, K, vocabulary).
        q: the draft's probabilities there, from which the tokens were drawn (B, K, vocabulary).
        drafted: the tokens (B, K).
        uniform: random numbers in [0, 1), (B, K).

    Returns:
        Counts (B,), 0 to K.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), algorithm 1; Chen et
    al., Accelerating Large Language Model Decoding with Speculative Sampling (2023), algorithm 2.
    """
    index = drafted.unsqueeze(-1)
    kept = uniform * q.gather(-1, index).squeeze(-1) < p.gather(-1, index).squeeze(-1)
    return kept.long().cumprod(1).sum(1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The probabilities for the token in place of a refused one: max(p - q, 0), normalised over the last dim.

    Where p and q differ only by rounding and nothing is left, the result is p.
    """
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


class Speculation:
    """Draws tokens of `model`, several for each block that it reads, with the distribution of tokens drawn one by one.

    Rows of a batch go in step: a block ends where the first row refuses a token. This adds no bias, because what other
    rows do is independent of this row's later tokens, which are drafted anew.

    Args:
        model: the large model.
        states: the states of both models after the prompt, the large one's first.
        draft: the small model.
        tokens: number of tokens drafted at a time.
        report: counts are added to it.
        sampling: how tokens are drawn from either model.
        generator: source of randomness.
    """

    def __init__(
        self,
        model: Decoder,
        states: tuple[TransformerState | None, TransformerState | None],
        draft: Decoder,
        tokens: int,
        report: DraftReport,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        # Room for the tokens that a refusal leaves to be read again beside the next block.
        self._model = History(model, 2 * (tokens + 1), states[0])
        self._draft = History(draft, 2 * (tokens + 1), states[1])
        self._tokens, self._sampling, self._generator, self.report = tokens, sampling, generator, report
        self._ready: list[Tensor] = []
        # The token of the text that the draft has not read yet, besides the newest.
        self._unread: Tensor | None = None

    def next(self, last: Tensor, seen: Tensor, done: Tensor, left: int) -> Tensor:
        """The next token of each row (B,).

        Args:
            last: the token before it (B,); on the first call, the token after the prompt.
            seen: tokens so far (B, vocabulary), `last` included; boolean.
            done: rows (B,) whose tokens do not matter anymore.
            left: how many tokens are still wanted, at least 1.
        """
        if not self._ready:
            self._ready = self._block(last.unsqueeze(1), seen, done, min(self._tokens, left - 1))
        return self._ready.pop(0)

    @torch.no_grad()
    def _block(self, last: Tensor, seen: Tensor, done: Tensor, count: int) -> list[Tensor]:
        """Draft `count` tokens, have the model read them, and return 1 to count + 1 further tokens of each row."""
        fed = last if self._unread is None else torch.cat([self._unread, last], 1)
        ids, masks, chances = [last], [seen], []
        for _ in range(count):
            logits = self._draft.feed(fed)[:, -1]
            chances.append(self._sampling.probabilities(logits, masks[-1]))
            fed = self._sampling.draw(chances[-1], self._generator).unsqueeze(1)
            ids.append(fed)
            masks.append(masks[-1].scatter(1, fed, True))
        block = torch.cat(ids, 1)
        logits = self._model.feed(block)
        p = self._sampling.probabilities(logits.flatten(0, 1), torch.stack(masks, 1).flatten(0, 1))
        p = p.unflatten(0, logits.shape[:2])
        if not count:
            return [self._sampling.draw(p[:, 0], self._generator)]
        q, drafted = torch.stack(chances, 1), block[:, 1:]
        # Greedy decoding needs no random numbers.
        uniform = torch.zeros(drafted.shape, device=drafted.device)
        if not self._sampling.greedy:
            uniform.uniform_(generator=self._generator)
        accepted = count_accepted(p[:, :-1], q, drafted, uniform).masked_fill(done, count)
        kept = int(accepted.min())
        rest = residual(p[:, kept], q[:, kept]) if kept < count else p[:, kept]
        token = self._sampling.draw(rest, self._generator)
        if kept < count:
            token = torch.where(accepted > kept, drafted[:, kept], token)
        self._model.back(count - kept)
        self._draft.back(max(0, count - 1 - kept))
        self._unread = drafted[:, -1:] if kept == count else None
        self.report.blocks += 1
        self.report.drafted += count * int((~done).sum())
        self.report.accepted += int((accepted[~done].clamp(max=kept + 1)).sum())
        return [*drafted[:, :kept].unbind(1), token]
