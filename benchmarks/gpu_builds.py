"""What the Triton backend compiles, compiled without a GPU: registers, shared memory, spills of every kernel."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.backends.triton_launch import STAGES, Launch

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
            plain = argument in launch.kernel.do_not_specialize
            signature[argument] = "i32" if plain else _describe(value, (n,), constants, aligned)
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
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run([*command, file.name], capture_output=True, encoding="utf-8", check=True).stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    return int(re.findall(r"Used (\d+) registers", said)[-1]), sum(spills)


def _amd_usage(assembly: str) -> tuple[int, int]:
    found = {name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", assembly)}
    return found["vgpr_count"], found["vgpr_spill_count"]
