"""What a run needs, before it starts: parameters, operations, memory, communication. Formulas: docs/scaling.md."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.model import Transformer
from gateloop_transformer.runs.config import RunConfig
from gateloop_transformer.training.needs import Communication, Estimate, Memory, Operations, Spread

# Weights, gradients, moments and what is exchanged are float32; autocast multiplies copies in bfloat16.
_WIDE, _NARROW = 4, 2


class _Unread(Transformer):
    """A model whose ids have no values."""

    def check_vocabulary(self, ids: Tensor) -> None:
        """Nothing to look at."""


@dataclass(frozen=True)
class _Kept:
    """A model without values, and the bytes that it keeps for the backward pass before and in the logits."""

    model: Transformer
    layers: int
    logits: int


@functools.lru_cache(maxsize=1)
def _trace(config: RunConfig, vocabulary: int, rows: int, length: int, device: str) -> _Kept:
    """One forward pass in which nothing is computed or allocated: sizes alone, as torch.compile traces them.

    Raises:
        ValueError: an argument of the model has no meaning.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: list[tuple[Tensor, bool]] = []
    at_logits = False

    def enter(*_arguments: object) -> None:
        nonlocal at_logits
        at_logits = True

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, at_logits))
        return tensor

    narrow = config.training.precision == "bf16"
    with FakeTensorMode(), torch.device(device):
        model = _Unread(**{**config.model.arguments(), "num_tokens": vocabulary})
        model.to_logits.register_forward_pre_hook(enter)
        ids = torch.zeros(rows, length + 1, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast(device, torch.bfloat16, enabled=narrow):
            model(ids, return_loss=True)
        seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        sizes = {False: 0, True: 0}
        for tensor, late in kept:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                sizes[late] += storage.nbytes()
    return _Kept(model, sizes[False], sizes[True])


def _visible(length: int, window: int | None) -> float:
    """Keys that a step of causal attention sees, on average."""
    span = length if window is None else min(window, length)
    return (span * (span + 1) / 2 + (length - span) * span) / length


def _mixer_operations(module: nn.Module, length: int, real: bool) -> tuple[float, float, float]:
    """Recurrence and attention for a token in the forward pass, and both in a training step."""
    # Per number of the state: a S + k v and Re(q S) forwards; states again and five gradients backwards.
    forward, training = (5, 14 + 5) if real else (10, 30 + 10)
    if isinstance(module, GateLoopedAttention):
        state = module.heads * module.dim_head**2
        return forward * state, 0.0, training * state
    if not isinstance(module, CausalFullAttention):
        return 0.0, 0.0, 0.0
    inner = module.heads * module.dim_head
    if module.data_dependent_rel_pos == "gate_loop":
        # Scores are a gate loop whose values are unit vectors, as many as there are steps.
        state, weighing = inner * length, 2 * inner * length
        return forward * state, weighing, training * state + 3 * weighing
    fused = module.softmax_normalize and not module.data_dependent_rel_pos
    attention = 4 * inner * (_visible(length, module.window) if fused else length)
    return 0.0, attention, (3.5 if fused else 3) * attention


def _linear(model: nn.Module) -> int:
    """Numbers in the matrices of Linear layers."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def _operations(model: Transformer, length: int) -> Operations:
    products = 2.0 * _linear(model)
    real = model.ablate_complex or model.ablate_state_transition
    mixers = [_mixer_operations(module, length, real) for module in model.modules()]
    recurrence, attention, training = (sum(part) for part in zip(*mixers, strict=True))
    return Operations(products, recurrence, attention, 3 * products + training)


def _memory(config: RunConfig, kept: _Kept, spread: Spread, rows: int, length: int, micro: int, ema: bool) -> Memory:
    parameters = [parameter for parameter in kept.model.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in parameters)
    shards = spread.processes if spread.sharded else 1
    own = _WIDE * math.ceil(numbers / shards)
    narrow = _NARROW if config.training.precision == "bf16" else 0
    copies, last = narrow * _linear(kept.model), narrow * _linear(kept.model.to_logits)
    steps = rows * length
    # Beside what is kept the gradient of the loss into the log probabilities, and on into the logits.
    logits = kept.logits - last + 2 * _WIDE * steps * kept.model.num_tokens
    # The gradients on both sides of the widest layer: the feed-forward's inner one, or q, k and v together.
    linear = (module for module in kept.model.layers.modules() if isinstance(module, nn.Linear))
    widest = 2 * _WIDE * steps * max(module.out_features for module in linear)
    blocks = [sum(each.numel() for each in block.parameters()) for block in kept.model.layers.children()]
    buffers = 0
    if spread.sharded and spread.processes > 1:
        # What is outside of the blocks stays; of the blocks, one is at work and the next is on its way.
        buffers = _WIDE * (numbers - sum(blocks) + 2 * max(blocks))
    elif spread.processes > 1:
        buffers = own
    activations = kept.layers - (copies - last)
    average = own if ema else 0
    passing = copies + activations + max(logits, widest)
    # In a single micro-batch gradients come as activations go.
    most = own + passing if micro > 1 else max(own, passing)
    return Memory(own, own, 2 * own, average, copies, activations, logits, buffers, 3 * own + average + buffers + most)


def _exchanged(model: Transformer, steps: int) -> int:
    """Numbers that a rank of context parallel hands on per sequence, both ways, of all layers; `steps`: of its part."""
    parts = 1 if model.ablate_complex or model.ablate_state_transition else 2
    numbers = 0
    for module in model.modules():
        if isinstance(module, GateLoopedAttention):
            # Forwards the product of the gates and the end state, backwards the gradients of two states.
            numbers += parts * module.heads * (1 + 3 * module.dim_head**2)
            numbers += 0 if module.conv is None else 2 * module.dim * (module.conv.taps - 1)
        elif isinstance(module, CausalFullAttention):
            # Keys and values, and their gradients.
            numbers += 2 * 2 * steps * module.heads * module.dim_head
    return numbers


def _communication(model: Transformer, spread: Spread, rows: int, length: int, micro: int) -> Communication:
    weights = _WIDE * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    part = (spread.processes - 1) / spread.processes
    others = spread.context_parallel - 1
    states = _WIDE * _exchanged(model, length) * others * rows * micro
    if spread.sharded:
        return Communication(round(part * weights * micro), round(2 * part * weights * micro), states)
    return Communication(round(2 * part * weights), 0, states)


def estimate(config: RunConfig, spread: Spread | None = None, *, device: str = "cpu") -> Estimate:
    """What a run needs. Nothing of the model's size is allocated or computed.

    Args:
        config: of the run.
        spread: how it is spread; None: one process.
        device: "cpu" or "cuda": what layers keep depends on the kernels there. "cuda" needs a GPU.

    Raises:
        ValueError: an argument of the model has no meaning, or a sequence is shorter than its spread.
    """
    spread = Spread() if spread is None else spread
    options = config.training
    if options.context < spread.context_parallel:
        raise ValueError(f"a context of {options.context} cannot be shared by {spread.context_parallel} processes")
    size = config.tokenizer.size
    rows, micro = spread.windows(options)
    length = math.ceil(options.context / spread.context_parallel)
    kept = _trace(config, size, rows, length, device)
    return Estimate(
        parameters=sum(parameter.numel() for parameter in kept.model.parameters()),
        vocabulary=size,
        tokens_per_step=options.batch * options.accumulate * options.context,
        steps=options.steps if options.minutes is None else None,
        spread=spread,
        operations=_operations(kept.model, options.context),
        memory=_memory(config, kept, spread, rows, length, micro, options.ema > 0),
        communication=_communication(kept.model, spread, rows, length, micro),
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that a new tensor could have there; None where that is not known.

    Of the CPU what Linux says is available, swap left out.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    said = Path("/proc/meminfo")
    if device.type != "cpu" or not said.exists():
        return None
    values = dict(line.split(":", 1) for line in said.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None
