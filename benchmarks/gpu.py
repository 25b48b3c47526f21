"""Times of the Triton kernels on this machine's GPU, beside other libraries' where they are installed.

make bench-gpu

Writes docs/results/gpu.json and gpu.md: medians of interleaved rounds, and what the bytes of arguments and
results would take at the bandwidth of a copy in the same round. docs/gpu.md says what to expect.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gateloop_transformer.bench.report import about
from gateloop_transformer.files import write_text
from gateloop_transformer.ops.channel_loop import channel_gate_loop
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.linear_scan import linear_scan

DEVICE = "cuda"
RESULTS = Path(__file__).parent.parent / "docs" / "results"
# (B, T) and width; a batch that fills a GPU, and one row.
SHAPES = ((8, 4096, 1024), (1, 65536, 1024))
HEADS = ((8, 4096, 16, 64), (1, 65536, 16, 64), (8, 4096, 8, 128))
ROUNDS, REPEATS = 7, 10

Case = tuple[str, str, Callable[[], Any], int]


def leaves(*tensors: Tensor) -> list[Tensor]:
    """As arguments that gradients are asked for."""
    return [x.detach().requires_grad_() for x in tensors]


def forward_and_backward(function: Callable[..., Tensor], *arguments: Tensor) -> dict[str, Callable[[], Any]]:
    """Both directions of a function of tensors, ready to be timed."""
    given, grad = leaves(*arguments), []

    def both() -> Any:
        result = function(*given)
        if not grad:
            grad.append(torch.randn_like(result))
        return torch.autograd.grad(result, given, grad[0])

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return {"forward": forward, "forward and backward": both}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def elementwise() -> Iterator[tuple[str, dict[str, Any]]]:
    """Functions of one width, by what they compute and whose they are."""
    for B, T, D in SHAPES:
        shape = f"({B}, {T}, {D}) bfloat16"
        qkv, z, s = random(B, T, 3 * D), random(B, T, 2 * D), random(B, T, D)
        ours = forward_and_backward(
            lambda *x: channel_gate_loop(x[0], x[1], swish=x[2], backend="triton")[0], qkv, z, s
        )
        yield f"gate loop, head size 1 {shape}", {"gateloop": ours, "bytes": 7 * B * T * D * 2}
        a, x = torch.rand_like(s) * 0.1 + 0.9, random(B, T, D)
        scans = {"gateloop": forward_and_backward(lambda a, x: linear_scan(a, x, backend="triton"), a, x)}
        if (scan := optional("accelerated_scan.warp", "scan")) is not None and T <= 65536:
            turned = [y.transpose(1, 2).contiguous() for y in (a, x)]
            scans["accelerated-scan (its layout)"] = forward_and_backward(scan, *turned)
        if (hgrn := optional("fla.ops.hgrn", "chunk_hgrn")) is not None:
            scans["fla, hgrn"] = forward_and_backward(lambda x, g, f=hgrn: f(x, g)[0], x, a.log())
        yield f"linear scan, real {shape}", {**scans, "bytes": 3 * B * T * D * 2}
        if (selective := optional("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")) is not None:
            u, delta = (random(B, D, T) for _ in range(2))
            A, BC = -torch.rand(D, 16, device=DEVICE), random(B, 16, T)
            mamba = forward_and_backward(lambda u, d, A=A, b=BC, f=selective: f(u, d.sigmoid(), A, b, b), u, delta)
            yield f"selective scan of 16 states {shape}", {"mamba-ssm": mamba}


def matrices() -> Iterator[tuple[str, dict[str, Any]]]:
    """Functions of heads, by what they compute and whose they are."""
    for B, T, H, K in HEADS:
        q, k, v = (random(B, T, H, K) for _ in range(3))
        z = random(B, T, H, dtype=torch.float32)
        functions: dict[str, Any] = {}

        def ours(q: Tensor, k: Tensor, v: Tensor, z: Tensor, turn: float) -> Tensor:
            size = torch.sigmoid(z + 3)
            gates = (size * torch.cos(turn * z), size * torch.sin(turn * z))
            return gate_loop(q, k, v, gates if turn else gates[0], backend="triton")[0]

        functions["gateloop, complex gates"] = forward_and_backward(lambda *x, f=ours: f(*x, 1.0), q, k, v, z)
        functions["gateloop, real gates"] = forward_and_backward(lambda *x, f=ours: f(*x, 0.0), q, k, v, z)
        if (gla := optional("fla.ops.simple_gla", "chunk_simple_gla")) is not None:
            log = torch.nn.functional.logsigmoid
            functions["fla, simple_gla"] = forward_and_backward(
                lambda q, k, v, z, f=gla, g=log: f(q, k, v, g(z + 3), scale=1.0)[0], q, k, v, z
            )
            functions["fla, complex gates on doubled keys"] = forward_and_backward(
                lambda q, k, v, z, f=gla, g=log: f(doubled(q, z), doubled(k, z), v, g(z + 3), scale=1.0)[0], q, k, v, z
            )
        attend = torch.nn.functional.scaled_dot_product_attention
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        functions["attention (torch)"] = forward_and_backward(lambda *x, f=attend: f(*x, is_causal=True), *turned)
        yield f"gate loop ({B}, {T}, {H} heads of {K}) bfloat16", {**functions, "bytes": 4 * B * T * H * K * 2}


def doubled(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (B, T, H, K) as two real blocks, turned by the product of all gates up to their step.

    Positive gates on these compute what gates of these angles (B, T, H) do on x.
    """
    turns = angles.cumsum(1).unsqueeze(-1)
    return torch.cat([x * turns.cos(), x * turns.sin()], -1).to(x.dtype)


def optional(module: str, name: str) -> Any:
    """Another library's function, None where it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def milliseconds(function: Callable[[], Any]) -> float:
    """Of one call, the mean of some."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / REPEATS


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.empty(1 << 28, device=DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2 * x.numel() / (milliseconds(lambda: y.copy_(x)) / 1e3)


def timed(run: Callable[[], Any], foreign: bool) -> float | str:
    """Milliseconds, or what a foreign library says that cannot run this."""
    try:
        return milliseconds(run)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if foreign:
            return str(error)
        raise


def rows() -> Iterator[dict[str, Any]]:
    """All cases: every round times all functions of a case in turn. A library that fails has a row that says so."""
    for what, functions in itertools.chain(elementwise(), matrices()):
        needed = functions.pop("bytes", None)
        for direction in ("forward", "forward and backward"):
            runs = {whose: both[direction] for whose, both in functions.items()}
            taken: dict[str, list[float]] = {whose: [] for whose in runs}
            copies = []
            for round in range(ROUNDS + 1):
                copies.append(bandwidth())
                for whose in list(taken):
                    time = timed(runs[whose], foreign=not whose.startswith("gateloop"))
                    if isinstance(time, str):
                        del taken[whose]
                        yield {"case": what, "direction": direction, "library": whose, "failed": time}
                    else:
                        taken[whose].append(time)
                if round == 0:
                    # Kernels are compiled in the first.
                    copies, taken = [], {whose: [] for whose in taken}
            for whose, times in taken.items():
                row = {"case": what, "direction": direction, "library": whose, "milliseconds": statistics.median(times)}
                if needed is not None and direction == "forward":
                    row["bound_milliseconds"] = needed / statistics.median(copies) * 1e3
                yield row


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The rows in Markdown."""
    lines = [f"# On a GPU: {device}", "", "Generated by `make bench-gpu`; medians of interleaved rounds.", ""]
    lines += ["| case | direction | library | ms | ms at a copy's bandwidth |", "|---|---|---|---|---|"]
    for row in rows:
        bound = f"{row['bound_milliseconds']:.3f}" if "bound_milliseconds" in row else ""
        time = f"{row['milliseconds']:.3f}" if "milliseconds" in row else "failed"
        lines.append(f"| {row['case']} | {row['direction']} | {row['library']} | {time} | {bound} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Time everything."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    found: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name()
    for row in rows():
        # Written at once: what fails later loses nothing.
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        write_text(RESULTS / "gpu.json", json.dumps({**about(), "device": device, "rows": found}, indent=1) + "\n")
        write_text(RESULTS / "gpu.md", table(found, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
