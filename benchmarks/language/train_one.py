"""Train one language model and print its row of the results as JSON; runs in whichever environment has the model.

python train_one.py '{"model": "gateloop", "options": {...}, "data": "text.txt", "lr": 0.003, "steps": 2000, ...}'
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import MODELS, logits_of, step
from torch import Tensor, nn

DEFAULTS: dict[str, Any] = {
    "options": {},
    "context": 64,
    "batch": 12,
    "steps": 2000,
    "cpu_seconds": None,
    "lr": 3e-3,
    "min_lr": 0.0,
    "warmup": 0.05,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "gate_lr": 1.0,
    "clip": 1.0,
    "seed": 0,
    "threads": 1,
    "precision": "float32",
    "carry_state": False,
    "characters": True,
    "valid": None,
    "eval_tokens": None,
    "reach": None,
}
# How many of the longest windows show how far back a model looks, and the tokens of the shortest.
_FAR_WINDOWS, _SHORTEST = 8, 64


def read(path: str) -> bytes:
    """A text, packed by xz or not."""
    data = Path(path).read_bytes()
    return lzma.decompress(data) if path.endswith(".xz") else data


def load(spec: dict[str, Any]) -> tuple[Tensor, Tensor, int, str]:
    """Training and validation tokens, the size of the vocabulary and the SHA-256 of both texts together."""
    train = read(spec["data"])
    if spec["valid"]:
        valid = read(spec["valid"])
    else:
        train, valid = train[: int(len(train) * 0.9)], train[int(len(train) * 0.9) :]
    digest = hashlib.sha256(train + valid).hexdigest()
    table = np.arange(256)
    if spec["characters"]:
        letters = np.unique(np.frombuffer(train + valid, dtype=np.uint8))
        table = np.zeros(256, dtype=np.int64)
        table[letters] = np.arange(len(letters))
    size = int(table.max()) + 1
    tokens = [torch.from_numpy(table[np.frombuffer(text, dtype=np.uint8)]) for text in (train, valid)]
    return tokens[0], tokens[1], size, digest


def groups(model: nn.Module, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Matrices decay, everything else does not; gates of ours learn at a rate of their own."""
    gates: set[int] = set()
    for module in model.modules():
        if hasattr(module, "gate_parameters"):
            gates |= {id(parameter) for parameter in module.gate_parameters()}
    kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parts: dict[str, list[nn.Parameter]] = {"decay": [], "plain": [], "gates": []}
    for parameter in model.parameters():
        kind = "decay" if parameter.ndim >= 2 and id(parameter) not in kept else "plain"
        parts["gates" if id(parameter) in gates else kind].append(parameter)
    return [
        {"params": parts["decay"], "weight_decay": spec["weight_decay"], "factor": 1.0},
        {"params": parts["plain"], "weight_decay": 0.0, "factor": 1.0},
        {"params": parts["gates"], "weight_decay": 0.0, "factor": spec["gate_lr"]},
    ]


def windows(tokens: Tensor, spec: dict[str, Any], generator: torch.Generator, step: int) -> Tensor:
    """(batch, context + 1): random places, or with carried state each row going on where it was."""
    context, batch = spec["context"], spec["batch"]
    if spec["carry_state"]:
        lane = (len(tokens) - 1) // batch
        starts = torch.arange(batch) * lane + (step * context) % (lane - context)
    else:
        starts = torch.randint(len(tokens) - context - 1, (batch,), generator=generator)
    return torch.stack([tokens[n : n + context + 1] for n in starts.tolist()])


def forward(model: nn.Module, ids: Tensor, state: Any, carry: bool, ours: bool) -> tuple[Tensor, Any]:
    """Logits, and the state where it is carried."""
    if not carry:
        return logits_of(model(ids)), None
    if ours:
        logits, state = model(ids, state=state, return_state=True)
        return logits, state.detach()
    logits, state = model(ids, state)
    return logits, tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor, spec: dict[str, Any]) -> float:
    """Nats per token over all validation windows, each from an empty state unless states are carried.

    With `eval_tokens` over as many windows as hold them, evenly spread over the text; carried states read all.
    """
    context = spec["context"]
    rows = max(1, 16384 // context)
    model.eval()
    total, count, state = 0.0, 0, None
    if spec["carry_state"]:
        rows = 12
        lane = (len(tokens) - 1) // rows
        for start in range(0, lane, context):
            size = min(context, lane - start)
            ids = torch.stack([tokens[n * lane + start : n * lane + start + size + 1] for n in range(rows)])
            logits, state = forward(model, ids[:, :-1], state, True, spec["model"] == "gateloop")
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += rows * size
    else:
        starts = list(range(0, len(tokens) - context - 1, context))
        if spec["eval_tokens"]:
            starts = starts[:: math.ceil(len(starts) * context / spec["eval_tokens"])]
        for first in range(0, len(starts), rows):
            ids = torch.stack([tokens[n : n + context + 1] for n in starts[first : first + rows]])
            logits = logits_of(model(ids[:, :-1]))
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids.shape[0] * context
    model.train()
    return total / count


def train(model: nn.Module, tokens: Tensor, spec: dict[str, Any]) -> dict[str, Any]:
    """Steps until the budget is spent, weights in float32, products in `precision`; seconds are the process's own."""
    optimizer = torch.optim.AdamW(groups(model, spec), lr=spec["lr"], betas=(0.9, spec["beta2"]), eps=1e-8, fused=True)
    generator = torch.Generator().manual_seed(spec["seed"])
    budget, step, state, losses = spec["cpu_seconds"], 0, None, []
    start = time.process_time()
    while True:
        spent = time.process_time() - start
        done = spent / budget if budget else step / spec["steps"]
        if done >= 1:
            break
        rise = min(1.0, (done + 1e-9) / spec["warmup"]) if spec["warmup"] else 1.0
        fall = max(0.0, (done - spec["warmup"]) / (1 - spec["warmup"]))
        share = spec["min_lr"] + (1 - spec["min_lr"]) * 0.5 * (1 + math.cos(math.pi * fall))
        rate = spec["lr"] * rise * share
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        ids = windows(tokens, spec, generator, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec["precision"] == "bfloat16"):
            logits, state = forward(model, ids[:, :-1], state, spec["carry_state"], spec["model"] == "gateloop")
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        losses.append(loss.item())
        step += 1
    seconds = time.process_time() - start
    return {"steps": step, "seconds": seconds, "train_loss": float(np.mean(losses[-100:]))}


@torch.no_grad()
def reach(model: nn.Module, tokens: Tensor, spec: dict[str, Any]) -> dict[str, Any]:
    """What more context than in training is worth: nats per token of one text, read in windows of ever more tokens.

    The longest are `reach` times the context. All begin with an empty state.

    Returns:
        "by_window": by the size of the windows; "by_position": by how many tokens of its window were read before one,
        each span from the shortest windows that have it.
    """
    longest = spec["reach"] * spec["context"]
    starts = [int(n) for n in np.linspace(0, len(tokens) - longest - 1, _FAR_WINDOWS)]
    texts = torch.stack([tokens[n : n + longest + 1] for n in starts])
    model.eval()
    by_window, by_position, size, first = {}, [], _SHORTEST, 0
    while size <= longest:
        inputs, targets = (part.reshape(-1, size) for part in (texts[:, :-1], texts[:, 1:]))
        rows = max(1, 16384 // size)
        losses = torch.cat(
            [
                F.cross_entropy(logits_of(model(some)).transpose(1, 2), wanted, reduction="none")
                for some, wanted in zip(inputs.split(rows), targets.split(rows), strict=True)
            ]
        )
        by_window[str(size)] = losses.mean().item()
        for last in (size // 2, size) if first else (size,):
            by_position.append({"from": first, "to": last - 1, "loss": losses[:, first:last].mean().item()})
            first = last
        size *= 4
    return {"by_window": by_window, "by_position": by_position}


@torch.no_grad()
def decoding(model: nn.Module, spec: dict[str, Any]) -> float:
    """Tokens decoded per second of the process, greedily, one text at a time, as many as a window has."""
    model.eval()
    seconds = []
    for _ in range(5):
        ids, state = torch.zeros(1, 1, dtype=torch.long), None
        start = time.process_time()
        for _ in range(spec["context"]):
            logits, state = step(spec["model"], model, ids, state)
            ids = logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.process_time() - start)
    return float(spec["context"] / np.median(seconds))


def main() -> None:
    """One row."""
    spec = {**DEFAULTS, **json.loads(sys.argv[1])}
    torch.set_num_threads(spec["threads"])
    train_tokens, valid_tokens, vocabulary, digest = load(spec)
    torch.manual_seed(spec["seed"])
    context = {"context": spec["context"]} if spec["model"] == "transformer" else {}
    model = MODELS[spec["model"]](vocabulary, **spec["options"], **context)
    model.train()
    # Kernels are compiled before the clock runs.
    warm = train_tokens[: spec["context"] * 2 + 2].reshape(2, -1)
    logits_of(model(warm[:, :-1])).sum().backward()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(spec["seed"])
    found = train(model, train_tokens, spec)
    loss = validate(model, valid_tokens, spec)
    tokens = found["steps"] * spec["batch"] * spec["context"]
    row = {
        **spec,
        **found,
        "data_sha256": digest,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": tokens,
        "tokens_per_second": tokens / found["seconds"],
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "decoding_tokens_per_second": decoding(model, spec),
        "val_loss": loss,
        "bits_per_byte": loss / math.log(2),
        **(reach(model, valid_tokens, spec) if spec["reach"] else {}),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
