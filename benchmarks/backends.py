"""Which backend runs what: docs/results/backends.md, made from the table of backends in ops/dispatch.py.

make results
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from gateloop_transformer.ops.dispatch import FUSED, TABLE, reads_layout
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop

PAGE = Path(__file__).parent.parent / "docs" / "results" / "backends.md"
DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)
# Recurrences by the sizes of heads and the dimensions of gates that kernels tell apart.
LOOPS: dict[str, tuple[int, int]] = {
    "`gate_loop`, head size 1": (1, 3),
    "`gate_loop`, gates per head": (4, 3),
    "`gate_loop`, gates per key channel": (4, 4),
}
# What runs in one pass where the backend has the function, and else is made of another operator, or of torch alone.
AROUND = {
    "channel_loop": ("loop_forward", "gate_loop"),
    "simple_gate_loop": ("loop_forward", "linear_scan"),
    "head_gates": ("gates_forward", None),
    "rms_norm": ("norm_forward", None),
    "short_convolution": ("conv_forward", None),
}


def reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run there, with all packages installed and no interpreter in place of a GPU."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        why = TABLE[backend].unsupported(torch.device(device), dtype)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    return None if why == getattr(TABLE[backend], "INSTALL_HINT", None) else why


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def devices() -> list[str]:
    """Backend × device × dtype, what "auto" takes, and why not."""
    lines = header("backend", *DEVICES, "needs")
    for backend in TABLE:
        cells = []
        for device in DEVICES:
            runs = [name(dtype) for dtype in DTYPES if reason(backend, device, dtype) is None]
            cells.append("all" if len(runs) == len(DTYPES) else ", ".join(runs) or "—")
        package = re.search(r"pip install [^`]+", getattr(TABLE[backend], "INSTALL_HINT", ""))
        lines.append(row(f"`{backend}`", *cells, f"`{package[0]}`" if package else "none"))
    cells = []
    for device in DEVICES:
        first = [next(b for b in TABLE if reason(b, device, dtype) is None) for dtype in DTYPES]
        cells.append(", ".join(f"`{backend}`" for backend in dict.fromkeys(first)))
    lines += [row('"auto" takes', *cells, ""), ""]
    for backend in TABLE:
        found: dict[str, dict[str, list[str]]] = {}
        for device, dtype in itertools.product(DEVICES, DTYPES):
            if (why := reason(backend, device, dtype)) is not None:
                found.setdefault(why, {}).setdefault(device, []).append(name(dtype))
        for why, refused in found.items():
            dtypes = next(iter(refused.values()))
            what = "" if len(dtypes) == len(DTYPES) else f"{', '.join(dtypes)} "
            lines.append(f"- `{backend}`, not {what}on {', '.join(refused)}: {why}.")
    return lines


def takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def features(backend: str, operator: str, in_kernels: bool) -> tuple[str, ...]:
    """States, direction, gradients, resets, documents, torch.compile: of one operator on one backend."""
    module = cast(ModuleType, TABLE[backend])
    forward, backward = (getattr(module, f"{operator}_{way}") for way in ("forward", "backward"))
    return (
        "yes" if takes(forward, "initial") else "—",
        "yes" if "tuple" in str(inspect.signature(forward).return_annotation) else "all states",
        "yes" if takes(forward, "reverse") else "—",
        "of all" if takes(backward, "grad") else "—",
        "yes",
        "in kernels" if in_kernels else "as rows of batches",
        "whole graph" if in_kernels else "whole graph, without `cu_seqlens`",
    )


def recurrences() -> list[str]:
    """Operator × backend × feature, backends that are alike in one line."""
    titles = "operator", "backends", "initial state", "final state", "`reverse`", "gradients"
    lines = header(*titles, "`resets`", "`cu_seqlens`", "`torch.compile`")
    operators = {"`linear_scan`": {b: features(b, "linear_scan", b in FUSED) for b in TABLE}}
    for title, (size, dims) in LOOPS.items():
        keys = torch.empty(1, 2, 3, size, device="meta")
        gates = Pair(torch.empty((1, 2, 3, size)[:dims], device="meta"))
        loops = {b: GateLoop(keys, keys, keys, gates, backend=b) for b in TABLE}
        operators[title] = {b: features(b, "gate_loop", reads_layout(loop)) for b, loop in loops.items()}
    for title, cells in operators.items():
        for alike in dict.fromkeys(cells.values()):
            backends = [f"`{backend}`" for backend in TABLE if cells[backend] == alike]
            lines.append(row(title, ", ".join(backends), *alike))
    return lines


def surroundings() -> list[str]:
    """Operators that some backends run in one pass."""
    lines = header("operator", *(f"`{backend}`" for backend in TABLE))
    for operator, (function, made_of) in AROUND.items():
        cells = []
        for backend in TABLE:
            if backend in FUSED and hasattr(FUSED[backend], function):
                cells.append("one pass")
            else:
                cells.append("plain torch" if made_of is None else f"around `{made_of}`")
        lines.append(row(f"`{operator}`", *cells))
    return lines


def page() -> str:
    """The page."""
    lines = [
        "# Backends: which runs what",
        "",
        "Generated by `make results` (benchmarks/backends.py) from the table of backends in",
        "`gateloop_transformer/ops/dispatch.py`, in its order of preference, as if every package were installed.",
        "A backend asked for by name that cannot says why; nothing is changed silently.",
        "",
        "## Devices and dtypes",
        "",
        "Of the inputs; complex ones are those of `linear_scan`. What a device itself lacks (float64 on mps), it lacks",
        "here too. ROCm devices are called cuda.",
        "",
        *devices(),
        "",
        "## Recurrences",
        "",
        *recurrences(),
        "",
        "## What surrounds them",
        "",
        "With gradients everywhere. `channel_loop` and `simple_gate_loop` have the features of what they are made of;",
        "in one pass, those of `gate_loop` with head size 1.",
        "",
        *surroundings(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
