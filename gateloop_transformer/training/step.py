"""One step's gradients: batches, loss and backward passes on all processes, and what they add up."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer.data.batches import batch_at, stream_at
from gateloop_transformer.data.corpus import Corpus
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.layers.state import TransformerState
from gateloop_transformer.ops.context_parallel import context_parallel
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.training.engine import Engine, full
from gateloop_transformer.training.watching import Clock

Carried = list[TransformerState | None]


class Flags(NamedTuple):
    """What one process has to tell the others after its backward passes.

    stop: it was asked to stop. trouble: it could not write.
    """

    stop: bool
    trouble: bool


class Outcome(NamedTuple):
    """A step's gradients as seen by all processes, and what of it is this process's own.

    loss: nats per predicted token. bits_per_byte: the same, over the bytes that these stand for. norm: of the gradient,
    before clipping. fault: "loss" or "gradient", which is not finite; "" where all is. stop, trouble: of `Flags`, from
    all. carried: states that the next windows begin with. ids: of the micro-batch at fault, or of the first.
    """

    loss: float
    bits_per_byte: float
    norm: float
    fault: str
    stop: bool
    trouble: bool
    carried: Carried
    ids: Tensor


class Objective(NamedTuple):
    """What is differentiated, the sum of nats in it, the predicted tokens and their bytes, and the state after."""

    total: Tensor
    nats: Tensor
    targets: int
    size: int
    state: TransformerState | None


def draw(
    tokens: Tokens, options: TrainingConfig, engine: Engine, step: int, micro: int
) -> tuple[Tensor, Tensor | None]:
    """A micro-batch of this process, and its part of the time: ids and resets (rows, steps + 1)."""
    which = stream_at if options.carry_state else batch_at
    sizes = {"windows": options.windows, "context": options.context, "seed": options.seed}
    ids, resets = which(tokens, step, **sizes, rows=engine.micro_batches(options)[micro])
    part = engine.part(options.context)
    steps = slice(part.start, part.stop + 1)
    return ids[:, steps].to(engine.device), None if resets is None else resets[:, steps].to(engine.device)


class Stepper:
    """Computes the gradients of steps.

    Args:
        model: for its parameters.
        runner: what is called in its place.
        corpus: to train on.
        options: of the training.
        engine: the processes.
        clock: told of the phases.
    """

    def __init__(
        self, model: nn.Module, runner: nn.Module, corpus: Corpus, options: TrainingConfig, engine: Engine, clock: Clock
    ) -> None:
        self.model, self.runner, self.tokens = model, runner, corpus.train
        self.options, self.engine, self.clock = options, engine, clock
        self.lengths = torch.from_numpy(np.array(corpus.tokenizer.lengths)).to(engine.device)

    def gradients(self, step: int, carried: Carried, flags: Flags) -> Outcome:
        """Forward and backward passes of all micro-batches of a step; gradients are clipped means over all tokens."""
        options, engine, clock = self.options, self.engine, self.clock
        # A seed for each step and process: no random state has to be kept for a resumed run.
        seeds = np.random.SeedSequence([options.seed, step, engine.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        nats, targets, size, bad, shown = 0.0, 0, 0, False, None
        states = list(carried)
        count = len(engine.micro_batches(options))
        for micro in range(count):
            ids, resets = draw(self.tokens, options, engine, step, micro)
            clock.lap("data")
            found = self._objective(ids, resets, carried[micro] if carried else None)
            value = found.nats.item()
            targets, size = targets + found.targets, size + found.size
            if carried:
                states[micro] = None if found.state is None else found.state.detach()
            shown = ids if shown is None or not (bad or math.isfinite(value)) else shown
            nats, bad = nats + value, bad or not math.isfinite(value)
            clock.lap("forward")
            self._backward(found.total, last=micro == count - 1)
        assert shown is not None
        mine = [0.0 if bad else nats, targets, size, bad, flags.stop, flags.trouble]
        nats, predicted, read, faults, stop, trouble = engine.sum([float(value) for value in mine])
        clock.lap("communication")
        norm = self._clip(predicted)
        fault = "loss" if faults else "" if math.isfinite(norm) else "gradient"
        clock.lap("optimizer")
        loss, bits = nats / max(predicted, 1.0), nats / max(read, 1.0) / math.log(2)
        return Outcome(loss, bits, norm, fault, stop > 0, trouble > 0, states, shown)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in bfloat16, where the run asks for them."""
        if self.options.precision == "bf16":
            return torch.autocast(self.engine.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _objective(self, ids: Tensor, resets: Tensor | None, state: TransformerState | None) -> Objective:
        """The loss of a micro-batch. No document is asked for the first token of the next."""
        options = self.options
        marks: dict[str, Any] = {} if resets is None else {"resets": resets[:, :-1]}
        targets = ids[:, 1:] if resets is None else ids[:, 1:].masked_fill(resets[:, 1:], -100)
        with self.autocast(), context_parallel(self.engine.context_group):
            result = self.runner(ids[:, :-1], state, return_state=options.carry_state, **marks)
            logits, after = result if options.carry_state else (result, None)
            logits = logits.flatten(0, 1)
            nats = F.cross_entropy(logits, targets.flatten(), reduction="sum")
            total = nats
            if options.z_loss:
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                squares = wide.logsumexp(-1).square().masked_fill(targets.flatten() < 0, 0)
                total = nats + options.z_loss * squares.sum()
        counted = targets if resets is None else targets[targets >= 0]
        return Objective(total, nats.detach(), counted.numel(), int(self.lengths[counted].sum()), after)

    def _backward(self, total: Tensor, last: bool) -> None:
        options, engine, clock = self.options, self.engine, self.clock
        # DDP and FSDP2 divide by the number of processes; gradients are to be sums.
        scale = engine.size / (options.windows * options.context)
        before = engine.last_exchange
        with engine.accumulating(self.runner, last):
            (total * scale).backward()
        clock.lap("backward")
        if engine.last_exchange > before:
            # What came after the last exchange had begun was waiting for it.
            clock.move(clock.last - engine.last_exchange, "backward", "communication")

    def _clip(self, predicted: float) -> float:
        """Make gradients means over all predicted tokens, and clip them; the norm before that."""
        options = self.options
        everything = options.windows * options.context
        for parameter in self.model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        if predicted not in (0, everything):
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], everything / predicted)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        return full(norm).item()
