"""What the Triton backend compiles, compiled without a GPU: registers, shared memory, spills of every kernel.

The launches themselves are written down, of tensors without memory: what is listed is what would run.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends import triton_gpu
from gateloop_transformer.ops.backends.triton_launch import STAGES, Launch, written_down
from gateloop_transformer.ops.channels import ChannelLoop
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair

DTYPES = (torch.bfloat16, torch.float32)
# Chips: Triton's backend, its name of the architecture, threads of a warp, KiB of shared memory that a block may have.
CHIPS: dict[str, tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163),
    "sm_90": ("cuda", 90, 32, 227),
    "gfx942": ("hip", "gfx942", 64, 64),
}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Usage(NamedTuple):
    """Of a compiled kernel: registers of a thread, shared memory of a block and what is spilled, bytes."""

    registers: int
    shared: int
    spills: int


def build(launch: Launch, chip: str) -> Usage:
    """A launch's kernel, compiled for a chip.

    Raises:
        ValueError: kernels are interpreted in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(launch.kernel, "fn") or not isinstance(launch.kernel, triton.JITFunction):
        raise ValueError("kernels are interpreted in this process (TRITON_INTERPRET=1) and cannot be compiled")
    name, architecture, warp, _ = CHIPS[chip]
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for n, (argument, parameter) in enumerate(inspect.signature(launch.kernel.fn).parameters.items()):
        value = launch.arguments[argument]
        if "constexpr" in str(parameter.annotation):
            signature[argument], constants[(n,)] = "constexpr", value
        else:
            signature[argument] = _describe(value, (n,), constants, aligned)
    source = ASTSource(launch.kernel, signature, constants, aligned)
    options = {"num_warps": launch.warps, "num_stages": STAGES}
    compiled = triton.compile(source, target=GPUTarget(name, architecture, warp), options=options)
    registers, spills = (
        _amd_usage(compiled.asm["amdgcn"]) if name == "hip" else _nvidia_usage(compiled.asm["ptx"], architecture)
    )
    return Usage(registers, compiled.metadata.shared, spills)


def _describe(value: Any, place: tuple[int, ...], constants: dict[Any, Any], aligned: dict[Any, Any]) -> Any:
    """Triton's name of an argument's type; what the launcher would say of it beside."""
    if isinstance(value, tuple):
        return tuple(_describe(item, (*place, n), constants, aligned) for n, item in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, Tensor) or value % 16 == 0:
        aligned[place] = [["tt.divisibility", 16]]
    return _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"


def _nvidia_usage(ptx: str, architecture: int) -> tuple[int, int]:
    """What the assembler says; a frame on the stack alone is none of it: the slow way of a cosine has one."""
    from triton.backends.nvidia.compiler import get_ptxas

    chip = f"sm_{architecture}a" if architecture >= 90 else f"sm_{architecture}"
    command = [get_ptxas(architecture).path, "-v", "--gpu-name", chip, "-o", os.devnull]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    return int(re.findall(r"Used (\d+) registers", said)[-1]), sum(spills)


def _amd_usage(assembly: str) -> tuple[int, int]:
    found = {name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", assembly)}
    return found["vgpr_count"], found["vgpr_spill_count"]


# ---- what is launched ---------------------------------------------------------------------------------------


def launches(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[str, Launch]]:
    """All kernels in all configurations, by name: each as it is launched for long sequences, and for one step."""
    seen = set()
    for dtype in dtypes:
        for what, launch in itertools.chain(_scans(dtype), _loops(dtype), _others(dtype)):
            constants = {name: value for name, value in launch.arguments.items() if name.isupper()}
            name = f"{launch.kernel.__name__.strip('_')} {str(dtype).removeprefix('torch.')} {what}"
            key = f"{name} {constants} {launch.warps}"
            if key not in seen:
                seen.add(key)
                yield name, launch


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scans(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for parts, packed in itertools.product((1, 2), (False, True)):
        shape = (1 if packed else 2), 4096, 512
        wide = torch.float32 if parts == 2 else dtype
        x, h = (Pair(*(_empty(*shape, dtype=kind) for _ in range(parts))) for kind in (dtype, wide))
        layout = _layout(packed)
        start = Pair(*(_empty(layout.states(shape[0]), 512) for _ in range(parts)))
        with written_down() as listed:
            triton_gpu.linear_scan_forward(x, x, start, False, layout)
            triton_gpu.linear_scan_backward(h, x, x, h, start, False, layout)
        what = ("real", "complex")[parts - 1] + (", packed" if packed else "")
        yield from ((what, launch) for launch in listed)


def _layout(packed: bool) -> Layout:
    if not packed:
        return Layout()
    return Layout(_empty(1, 4096, dtype=torch.bool), torch.empty(9, dtype=torch.int64, device="meta"))


def _as_heads(state: Tensor) -> Tensor:
    """(B, H) → (B, H, 1, 1)."""
    return state[..., None, None]


def _loops(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for gate, T in itertools.product(("polar", "paper", "ring", "sigmoid", "given"), (4096, 1)):
        for packed in (False, True) if (gate, T) == ("polar", 4096) else (False,):
            B, D, layout = 1 if packed else 2, 512, _layout(packed)
            qkv = _empty(B, T, 3 * D, dtype=dtype)
            q, k, v = qkv.chunk(3, -1)
            z = _empty(B, T, 2 * D, dtype=dtype)
            bias = Pair(_empty(D), _empty(D)) if gate == "ring" else None
            swish = _empty(B, T, D, dtype=dtype) if gate not in ("sigmoid", "given") else None
            gates = Pair(v) if gate == "sigmoid" else Pair(z)
            if gate == "given":
                gates = Pair(_empty(B, T, D), _empty(B, T, D))
            loop = ChannelLoop(q, None if gate == "sigmoid" else k, v, gates, swish, bias, gate, 1.0, False, layout)
            state = Pair(*(_empty(layout.states(B), D) for _ in range(loop.parts)))
            with written_down() as listed:
                y, _, kept = triton_gpu.loop_forward(loop, state)
                if gate == "given":
                    final, apart = state.map(_as_heads), gates.map(lambda x: x.unsqueeze(-1))
                    dy, q, k, v = (x.unsqueeze(-1) for x in (y, q, k, v))
                    triton_gpu.gate_loop_backward(dy, final, q, k, v, apart, final, False, layout)
                else:
                    triton_gpu.loop_backward(loop, y, state, kept, qkv)
            what = gate + (", packed" if packed else "") + (", one step" if T == 1 else "")
            yield from ((what, launch) for launch in listed)


def _others(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for gate in ("polar", "paper", "ring"):
        z = _empty(2, 4096, 32, dtype=dtype)
        bias = Pair(_empty(16), _empty(16)) if gate == "ring" else None
        with written_down() as listed:
            results = triton_gpu.gates_forward(z, gate, bias, False)
            triton_gpu.gates_backward(results, z, gate, bias, False, 1.0)
        yield from ((gate, launch) for launch in listed)
    for D in (64, 512, 4096):
        x = _empty(2, 4096, D, dtype=dtype)
        with written_down() as listed:
            triton_gpu.norm_forward(x, _empty(D))
            triton_gpu.norm_backward(x, x, _empty(D))
        yield from ((f"width {D}", launch) for launch in listed)
    x, w = _empty(2, 4099, 512, dtype=dtype), _empty(512, 4)
    with written_down() as listed:
        triton_gpu.conv_backward(triton_gpu.conv_forward(x, w, True), x, w, True)
    yield from (("4 taps, SiLU", launch) for launch in listed)
