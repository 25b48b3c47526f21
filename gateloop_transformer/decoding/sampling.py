"""How a token is drawn from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_TOP_K = "top_k must be an integer of at least 1"
# Temperatures below it could only overflow on the way to the same choice.
_GREEDY = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits. Fields apply in their order; a logit of -inf excludes its token.

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
        """Refuse values out of range."""
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
        """Pick the next token of each row (B,) from logits (B, vocabulary) and a mask of the tokens seen so far."""
        logits = self.penalised(logits.float(), seen)
        return self.draw(logits if self.greedy else self._chances(logits), generator)

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Probabilities that `pick` draws from (B, vocabulary), float32; where greedy, 1 for the likeliest token."""
        logits = self.penalised(logits.float(), seen)
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float() if self.greedy else self._chances(logits)

    def draw(self, probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a token for each row (B,) from unnormalised probabilities (B, vocabulary); if greedy, the likeliest."""
        if self.greedy:
            return probabilities.argmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and nothing is drawn."""
        return self.temperature < _GREEDY

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Apply the repetition penalty to logits (B, vocabulary).

        Raises:
            RuntimeError: a logit is NaN or inf, or all logits of a row are -inf.
        """
        # The maximum of a row is NaN or inf where the row has one, and -inf where it has nothing else.
        highest = logits.amax(-1)
        if not torch.isfinite(highest).all():
            if (highest == -torch.inf).any():
                raise RuntimeError("the model gave a row of logits that are all -inf: every token is excluded")
            raise RuntimeError("the model gave logits that are not finite (NaN or inf); its weights may be damaged")
        if self.repetition_penalty == 1:
            return logits
        punished = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, punished, logits)

    def _chances(self, logits: Tensor) -> Tensor:
        return self._filter((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)

    def _filter(self, logits: Tensor) -> Tensor:
        """Set logits that top_k, top_p or min_p exclude to -inf; the likeliest token always stays."""
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
