"""The cost model of docs/scaling.md against what this machine counts and takes. Writes docs/results/cost-model.md.

python benchmarks/cost_model.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gateloop_transformer import Transformer
from gateloop_transformer.bench.report import about, about_line
from gateloop_transformer.ops.backends import chunkwise, eager, numba_cpu
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop
from gateloop_transformer.runs.config import RunConfig, resolve
from gateloop_transformer.runs.presets import PRESETS
from gateloop_transformer.training.estimate import estimate
from gateloop_transformer.training.needs import Estimate, Spread

RING = {"gate": "ring", "conv_size": 4, "max_memory": 256}
HEADS = {**RING, "gate_loop_heads": 8, "head_norm": True}
SIZE = {"dim": 256, "depth": 4, "context": 512, "batch": 4}
# Name, settings beside the tiny preset's, vocabulary.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("head size 1", {**SIZE, **RING, "gate_loop_heads": None, "head_norm": False}, 256),
    ("8 heads", {**SIZE, **HEADS}, 256),
    ("8 heads, bf16, 2 micro-batches", {**SIZE, **HEADS, "precision": "bf16", "accumulate": 2}, 256),
    ("8 heads, vocabulary 8,192", {**SIZE, **HEADS}, 8192),
    ("attention", {**SIZE, "layer_pattern": "attention", "heads": 4, "rotary_emb": True}, 256),
    ("gate gate attention", {**SIZE, **HEADS, "layer_pattern": "gate gate attention", "heads": 4}, 256),
    ("preset small, batch 2", {**PRESETS["small"], "batch": 2, "context": 256}, 256),
]
# Of one H100 (SXM): dense bf16 FLOP/s, bytes/s of its memory, of NVLink one way, and of its share of the network.
FLOPS, HBM, NVLINK, NETWORK, UTILISATION = 989e12, 3.35e12, 450e9, 50e9, 0.4
GPUS, NODE = 64, 8


def config_of(settings: dict[str, Any]) -> RunConfig:
    """The tiny preset with these settings."""
    return resolve("tiny", settings, None)


def status(name: str) -> int:
    """Bytes of this process, as Linux counts them: VmRSS (now), VmHWM (the most)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def train_step(model: Transformer, optimizer: torch.optim.Optimizer, config: RunConfig, batch: int) -> None:
    """One step on random tokens, as `gateloop train` does it."""
    options = config.training
    for _ in range(options.accumulate):
        ids = torch.randint(0, model.num_tokens, (batch, options.context + 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model(ids, return_loss=True)
        (loss / options.accumulate).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def new_run(config: RunConfig, vocabulary: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model and its optimizer."""
    model = Transformer(**{**config.model.arguments(), "num_tokens": vocabulary})
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def measure(number: int) -> dict[str, float]:
    """Peak memory and seconds of a step, beyond what Python, torch and compiled kernels take; in a fresh process."""
    _, settings, vocabulary = CASES[number]
    config = config_of(settings)
    train_step(*new_run(config, vocabulary), config, 1)
    gc.collect()
    before = status("VmRSS")
    model, optimizer = new_run(config, vocabulary)
    train_step(model, optimizer, config, config.training.batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        train_step(model, optimizer, config, config.training.batch)
        seconds.append(time.perf_counter() - start)
    return {"bytes": status("VmHWM") - before, "seconds": sorted(seconds)[1]}


def measure_apart(number: int) -> dict[str, float]:
    """`measure` in a process of its own, whose allocator gives back what is freed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--measure", str(number)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def counted(config: RunConfig, vocabulary: int) -> int:
    """Operations of all products of a step, as torch counts them; attention without its shortcuts, over all keys."""
    model, _ = new_run(config, vocabulary)
    ids = torch.randint(0, vocabulary, (config.training.batch, config.training.context + 1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, return_loss=True).backward()
    return int(counter.get_total_flops()) * config.training.accumulate


def as_counted(config: RunConfig, found: Estimate) -> float:
    """The estimate's products of a step, with attention as if every step saw all keys and nothing were done twice."""
    per_layer = 4 * config.model.heads * config.model.dim_head * config.training.context
    pattern = (config.model.layer_pattern or "gate").split()
    layers = sum(pattern[n % len(pattern)] == "attention" for n in range(config.model.depth))
    return 3 * (found.operations.products + layers * per_layer) * found.tokens_per_step


class Operations(TorchDispatchMode):
    """Counts multiplications and additions of numbers, of complex ones 6 and 2, and those of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and count."""
        result = func(*args, **(kwargs or {}))
        name, tensors = func.name().split("::")[1].split(".")[0], [x for x in args if isinstance(x, torch.Tensor)]
        both = len(tensors) > 1 and all(x.is_complex() for x in tensors[:2])
        if name == "mul":
            self.count += result.numel() * (6 if both else 2 if result.is_complex() else 1)
        elif name == "add":
            self.count += result.numel() * (2 if both else 1)
        elif name == "sum":
            self.count += tensors[0].numel() * (2 if result.is_complex() else 1)
        elif name == "bmm":
            self.count += 2 * result.numel() * tensors[0].shape[-1]
        return result


def recurrence(size: int) -> dict[str, float]:
    """Operations for a step and a number of a head's state (size × size): by definition, and of products in chunks."""
    T = 256
    q, k, v, dy = (torch.randn(1, T, 1, size) for _ in range(4))
    gates = Pair(torch.rand(1, T, 1), torch.rand(1, T, 1))
    final = Pair(*(torch.zeros(1, 1, size, size) for _ in range(2)))
    found = {}
    for way, run in (
        ("forward", lambda backend: backend.gate_loop_forward(GateLoop(q, k, v, gates))),
        ("backward", lambda backend: backend.gate_loop_backward(GateLoop(q, k, v, gates), dy, final)),
    ):
        with Operations() as counter:
            run(eager)
        with FlopCounterMode(display=False) as products:
            run(chunkwise)
        found[way] = counter.count / (T * size * size)
        found[f"{way}, products in chunks"] = products.get_total_flops() / (T * size * size)
    return found


def check() -> dict[str, Any]:
    """All cases: what is estimated and what was counted or taken."""
    rows = []
    for number, (name, settings, vocabulary) in enumerate(CASES):
        config = config_of(settings)
        found, taken = estimate(config, vocabulary=vocabulary), measure_apart(number)
        rows.append(
            {
                "name": name,
                "parameters": found.parameters,
                "parameters_counted": sum(p.numel() for p in new_run(config, vocabulary)[0].parameters()),
                "products": as_counted(config, found),
                "products_counted": counted(config, vocabulary),
                "memory": found.memory.total,
                "memory_taken": taken["bytes"],
                "flops": found.flops_per_step,
                "seconds": taken["seconds"],
            }
        )
        print(name, rows[-1], file=sys.stderr)
    return {"cases": rows, "recurrence": {str(size): recurrence(size) for size in (1, 16, 64)}}


def plain_torch(config: RunConfig, vocabulary: int) -> Estimate:
    """The estimate where no fused kernels are: what layers keep on a GPU."""
    with mock.patch.object(numba_cpu, "unsupported", return_value="as on a GPU"):
        from gateloop_transformer.training.estimate import _trace

        _trace.cache_clear()
        found = estimate(config, vocabulary=vocabulary)
        _trace.cache_clear()
        return found


def presets() -> list[dict[str, Any]]:
    """A row for each preset: sizes with 256 and 32,768 tokens, and a step's work and memory."""
    rows = []
    for name in PRESETS:
        config = resolve(name, {}, None)
        small, large = (estimate(config, vocabulary=size) for size in (256, 32768))
        gpu = plain_torch(config, 32768)
        tokens = small.memory.activations / (config.training.batch * config.training.context)
        rows.append(
            {
                "name": name,
                "parameters": small.parameters,
                "parameters_32k": large.parameters,
                "tokens_per_step": small.tokens_per_step,
                "flops_per_token": small.operations.training,
                "flops_per_token_32k": large.operations.training,
                "kept_per_token": tokens,
                "kept_per_token_plain": gpu.memory.activations / (config.training.batch * config.training.context),
                "memory": small.memory.total,
                "memory_32k": large.memory.total,
                "memory_32k_plain": gpu.memory.total,
            }
        )
    return rows


def transfer(size: float, times: float) -> float:
    """Seconds to pass `size` bytes once around all GPUs (`times`: 2 for an all-reduce, 1 for a gather or scatter).

    Within a node by NVLink, then between nodes, where each GPU's share of the network carries an eighth.
    """
    nodes = GPUS // NODE
    return times * size * ((NODE - 1) / NODE / NVLINK + (nodes - 1) / nodes / NODE / NETWORK)


def on_paper() -> dict[str, Any]:
    """xl with 32,768 tokens on 64 H100: speed, days, communication, context parallel at 2^20 tokens."""
    config = resolve("xl", {}, None)
    alone, spread = (estimate(config, Spread(n), vocabulary=32768) for n in (1, GPUS))
    sharded = estimate(config, Spread(GPUS, sharded=True), vocabulary=32768)
    speed = GPUS * FLOPS * UTILISATION / alone.operations.training
    step = alone.tokens_per_step / speed
    weights = 4.0 * alone.parameters
    times = {
        "ddp": transfer(weights, 2),
        "fsdp2": transfer(weights, 3),
        "fsdp2_bf16_gathers": transfer(weights, 2),
    }
    long = resolve("xl", {"context": 1 << 20, "batch": 1, "accumulate": 1}, None)
    ranks = []
    for count in (1, 2, 4, 8, 64):
        found = estimate(long, Spread(count, count), vocabulary=32768)
        seconds = (1 << 20) * found.operations.training / (count * FLOPS * UTILISATION)
        sent = found.communication.states
        ranks.append(
            {
                "ranks": count,
                "activations": found.memory.activations,
                "sent": sent,
                "sent_seconds": sent / (NVLINK if count <= NODE else NETWORK),
                "step_seconds": seconds,
            }
        )
    return {
        "parameters": alone.parameters,
        "flops_per_token": alone.operations.training,
        "tokens_per_second": speed,
        "step_seconds": step,
        "days": {f"{tokens} B": tokens * 1e9 / speed / 86400 for tokens in (20, 200)},
        "transfer_seconds": times,
        "memory": {"ddp": spread.memory.total, "fsdp2": sharded.memory.total},
        "activations_plain": plain_torch(resolve("xl", {"accumulate": 1}, None), 32768).memory.activations,
        "hbm_seconds_per_token": 4 * alone.memory.activations / (4 * 2048) / HBM,
        "context_parallel": ranks,
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def si(value: float) -> str:
    """Three digits and k, M, G, T, P or E.

    >>> si(1234567)
    '1.23 M'
    """
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def checked(results: dict[str, Any]) -> list[str]:
    """The tables of what was counted and taken here."""
    cases = [
        [
            row["name"],
            f"{row['parameters']:,}" + ("" if row["parameters"] == row["parameters_counted"] else " (differs)"),
            f"{si(row['products'])}FLOP",
            f"{si(row['products_counted'])}FLOP",
            f"{row['products'] / row['products_counted'] - 1:+.2%}",
            f"{si(row['memory'])}B",
            f"{si(row['memory_taken'])}B",
            f"{row['memory'] / row['memory_taken'] - 1:+.1%}",
            f"{row['flops'] / row['seconds'] / 1e9:.0f}",
        ]
        for row in results["cases"]
    ]
    head = ["run", "parameters", "products", "counted", "error", "memory", "taken", "error", "GFLOP/s"]
    sizes = [
        [size, *(f"{row[way]:.2f}" for way in ("forward", "backward")), *(f"{row[way]:.1f}" for way in list(row)[1::2])]
        for size, row in results["recurrence"].items()
    ]
    return [
        "## Checked here\n",
        "One training step. Products: the estimate's, attention as if every step saw all keys, beside what "
        "`FlopCounterMode` counts; memory: the estimate's peak beside the growth of the process's largest resident "
        "set. GFLOP/s: the estimate of a whole step, recurrence included, by the median time of three.\n",
        table(head, cases),
        "\nThe recurrence, in operations for a step and a number of a head's state: the model says 10 forwards and 30 "
        "backwards. Counted one by one in the definition (the `eager` backend), and the products alone of the way in "
        "chunks (`chunkwise`), which does the same with matrix products of chunks. Sums over a head of size 1 need no "
        "addition; its backend runs no products.\n",
        table(["head size", "forward", "backward", "in chunks, forward", "in chunks, backward"], sizes),
    ]


def planned(results: dict[str, Any]) -> list[str]:
    """The tables of what is on paper alone."""
    rows = [
        [
            row["name"],
            si(row["parameters"]).replace("G", "B"),
            si(row["parameters_32k"]).replace("G", "B"),
            f"{row['tokens_per_step']:,}",
            f"{si(row['flops_per_token'])}FLOP",
            f"{si(row['flops_per_token_32k'])}FLOP",
            f"{si(row['kept_per_token'])}B",
            f"{si(row['kept_per_token_plain'])}B",
            f"{si(row['memory'])}B",
            f"{si(row['memory_32k'])}B",
            f"{si(row['memory_32k_plain'])}B",
        ]
        for row in results["presets"]
    ]
    head = ["preset", "parameters", "32k", "tokens in a step", "work of a token", "32k", "kept for a token"]
    head += ["plain torch", "memory", "32k", "32k, plain torch"]
    paper = results["paper"]
    moved = paper["transfer_seconds"]
    days = ", ".join(f"{tokens} tokens {value * 24:.1f} h" for tokens, value in paper["days"].items())
    ranks = [
        [
            str(row["ranks"]),
            f"{si(row['activations'])}B",
            f"{si(row['sent'])}B",
            f"{row['sent_seconds'] * 1e3:.1f} ms",
            f"{row['step_seconds']:.2f} s",
        ]
        for row in paper["context_parallel"]
    ]
    return [
        "\n## Presets\n",
        "Vocabularies of 256 and of 32,768 (32k) tokens; one process; what layers keep for the backward pass with the "
        "fused CPU kernels and with plain torch, as on a GPU.\n",
        table(head, rows),
        "\n## On paper: xl on 64 GPUs\n",
        f"{paper['parameters'] / 1e9:.2f} B parameters (32k), {si(paper['flops_per_token'])}FLOP for a token; "
        f"{GPUS} × {si(FLOPS)}FLOP/s at {UTILISATION:.0%}: {si(paper['tokens_per_second'])}tokens/s, a step of 524,288 "
        f"tokens in {paper['step_seconds']:.3f} s; {days}. "
        f"Passing gradients and weights takes {moved['ddp']:.3f} s (DDP), {moved['fsdp2']:.3f} s (FSDP2), "
        f"{moved['fsdp2_bf16_gathers']:.3f} s (FSDP2, weights gathered in bfloat16) of a step. Memory of a process: "
        f"{si(paper['memory']['ddp'])}B (DDP), {si(paper['memory']['fsdp2'])}B (FSDP2); activations with plain torch "
        f"{si(paper['activations_plain'])}B. Four passes over what is kept take "
        f"{paper['hbm_seconds_per_token'] * 1e6:.1f} µs for a token at the memory's speed, the products at full speed "
        f"{paper['flops_per_token'] / FLOPS * 1e6:.1f} µs.\n",
        "One sequence of 1,048,576 tokens over several ranks:\n",
        table(["ranks", "activations of a rank", "sent by a rank", "takes", "the step takes"], ranks),
    ]


def main() -> None:
    """Measure all and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--measure", type=int, metavar="N", help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    results = {**about(), **check(), "presets": presets(), "paper": on_paper()}
    (arguments.out / "cost-model.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "cost-model.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    lines = [
        "# The cost model, checked\n",
        "Generated by `python benchmarks/cost_model.py`; not to be edited. What it means: "
        "[scaling.md](../scaling.md).\n",
        f"{about_line(results)}; commit {results['commit']}.\n",
        *checked(results),
        *planned(results),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
