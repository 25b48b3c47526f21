"""Inputs, references and tolerances that the tests share."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from gateloop_transformer.ops.operator import OPERATORS

# Backends whose kernels Python interprets here, for lack of their device: what takes a compiled kernel a blink takes
# them seconds, so laws that evaluate often do so less often, at fewer steps.
INTERPRETED = ("triton",)
# Backends that take seconds for every case: of a test's cases each option is somewhere, all of them in `make slow`.
DEAR = (*INTERPRETED, "jax")
LENGTHS = (1, 2, 63, 129, 1000)
MAGNITUDES = (0.0, 0.5, 1 - 1e-7)
PHASES = (0.0, math.pi, -math.pi)
# Of the gate loop: kinds of gates and sizes that every law runs on, on both sides.
KINDS = {
    "real-head": {"is_complex": False, "per_channel": False},
    "real-channel": {"is_complex": False, "per_channel": True},
    "complex-head": {"is_complex": True, "per_channel": False},
    "complex-channel": {"is_complex": True, "per_channel": True},
}
# Many heads of a small size have kernels of their own in one backend.
SIZES = {"K3V5": {"K": 3, "V": 5}, "K1V1": {"K": 1, "V": 1}, "H9K3V5": {"H": 9, "K": 3, "V": 5}}
# Of the linear scan: real (r) or complex (c) gates, inputs, initial state.
SCAN_KINDS = ["".join(kinds) for kinds in itertools.product("rc", repeat=3)]
DIRECTIONS = {"forward": False, "reverse": True}
PAIRS = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class Loop(NamedTuple):
    """Arguments of `gate_loop`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    gates: Tensor
    initial: Tensor


class Scan(NamedTuple):
    """Arguments of `linear_scan`."""

    gates: Tensor
    inputs: Tensor
    initial: Tensor


def older(package: str, release: str) -> bool:
    """Whether a package is installed in a release before this one."""
    try:
        return Version(version(package)) < Version(release)
    except PackageNotFoundError:
        return False


def needs(package: str, least: str, reason: str) -> pytest.MarkDecorator:
    """For what older releases, supported otherwise, cannot do: skipped on them, for a reason that is said."""
    return pytest.mark.skipif(older(package, least), reason=f"needs {package} {least}: {reason}")


# On every test whose kernels are interpreted.
INTERPRETABLE = pytest.mark.skipif(
    older("triton", "3.8") and not older("numpy", "2.4"),
    reason="needs triton 3.8 or numpy before 2.4: the interpreter takes arrays for numbers, which numpy refuses since",
)


def make_gates(*shape: int, is_complex: bool, seed: int = 0) -> Tensor:
    """Float64 gates; along axis 2 in turn: long memories, extremes but 0, extremes among ordinary ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def among(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape, generator=generator)]

    free = uniform() < 0.5
    phase = torch.where(free, (2 * uniform() - 1) * math.pi, among(PHASES))
    long = 1 - 0.01 * uniform()
    extreme = among(MAGNITUDES[1:])
    mixed = torch.where(free, uniform(), among(MAGNITUDES))
    head = torch.arange(shape[2]).view(-1, *[1] * (len(shape) - 3)) % 3
    magnitude = torch.where(head == 0, long, torch.where(head == 1, extreme, mixed))
    if is_complex:
        return torch.polar(magnitude, phase)
    return magnitude * torch.where(phase.cos() < 0, -1.0, 1.0)


def make_loop(
    B: int = 1,
    T: int = 21,
    H: int = 3,
    K: int = 3,
    V: int = 5,
    *,
    is_complex: bool = True,
    per_channel: bool = False,
    seed: int = 0,
) -> Loop:
    """Float64 arguments of a gate loop, the initial state complex where the gates are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    gates = make_gates(B, T, H, *([K] if per_channel else []), is_complex=is_complex, seed=seed)
    return Loop(
        normal(B, T, H, K),
        normal(B, T, H, K),
        normal(B, T, H, V),
        gates,
        normal(B, H, K, V, dtype=gates.dtype),
    )


def make_scan(B: int = 2, T: int = 21, D: int = 5, *, kinds: str = "ccc", seed: int = 0) -> Scan:
    """Float64 arguments of a linear scan; `kinds`: real (r) or complex (c) gates, inputs, initial state."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.complex128 if kind == "c" else torch.float64 for kind in kinds]
    return Scan(
        make_gates(B, T, D, is_complex=kinds[0] == "c", seed=seed),
        torch.randn(B, T, D, generator=generator, dtype=dtypes[1]),
        torch.randn(B, D, generator=generator, dtype=dtypes[2]),
    )


def cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Float64 tensors in `dtype`, complex ones in its complex type."""
    return [x.to(PAIRS[dtype] if x.is_complex() else dtype) for x in tensors]


def naive_gate_loop(
    q: Tensor, k: Tensor, v: Tensor, re: Tensor, im: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula as written, in the arguments' own dtype, gradients by autograd: y and the parts of S."""
    if re.ndim == 3:
        re, im = re.unsqueeze(-1), im.unsqueeze(-1)
    S = Z = q.new_zeros(*q[:, 0].shape, v.shape[-1])
    y: dict[int, Tensor] = {}
    for t in range(q.shape[1])[:: -1 if reverse else 1]:
        a, b = re[:, t, ..., None], im[:, t, ..., None]
        S, Z = a * S - b * Z + k[:, t, ..., None] * v[:, t, :, None], a * Z + b * S
        y[t] = (q[:, t, ..., None] * S).sum(-2)
    return torch.stack([y[t] for t in sorted(y)], 1), S, Z


def naive_linear_scan(a: Tensor, x: Tensor, h: Tensor, reverse: bool = False) -> Tensor:
    """The formula as written, in the arguments' own dtype, gradients by autograd."""
    states: dict[int, Tensor] = {}
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        h = a[:, t] * h + x[:, t]
        states[t] = h
    return torch.stack([states[t] for t in sorted(states)], 1)


def weights(like: Tensor) -> Tensor:
    """A fixed cotangent with no symmetry, the same in every dtype."""
    return torch.cos(torch.arange(like.numel(), dtype=torch.float64) * 1.7 + 0.3).reshape(like.shape)


def real_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as reals with a last dimension of two."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def flat(outputs: Any) -> list[Tensor]:
    """The tensors in nested tuples or lists."""
    return [outputs] if isinstance(outputs, Tensor) else [x for item in outputs for x in flat(item)]


def values_and_gradients(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """All results of `function` and the gradients of all `tensors` through all results."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = [real_parts(x) for x in flat(function(*leaves))]
    loss = torch.stack([(x.to(torch.float64) * weights(x)).sum() for x in outputs]).sum()
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [*(x.detach() for x in outputs), *(real_parts(x) for x in gradients)]


def assert_equal(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Largest deviation, relative to the largest entry where that exceeds 1; shapes and dtypes agree."""
    assert len(results) == len(expected)
    for n, (x, reference) in enumerate(zip(results, expected, strict=True)):
        assert x.shape == reference.shape, n
        assert x.dtype == reference.dtype, n
        if x.numel():
            scale = max(1.0, reference.abs().max().item())
            error = (x - reference).abs().max().item() / scale
            assert error <= tolerance, f"result {n}: {error:.2e}"


def rms_ratio(x: Tensor, reference: Tensor) -> float:
    """RMS of the deviation over RMS of the reference."""
    deviation = (x.double() - reference.double()).square().mean().sqrt()
    return (deviation / reference.double().square().mean().sqrt().clamp(min=1e-30)).item()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    """`function` compiled into one graph, none of an earlier test's graphs kept."""
    torch.compiler.reset()
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend)
    return result


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its kin give NaN instead of whatever lay there."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pieces(x: Tensor, cuts: Iterable[int]) -> list[Tensor]:
    """Stretches of time: (B, T, …) cut before the steps `cuts`."""
    edges = [0, *sorted(cuts), x.shape[1]]
    return [x[:, start:stop] for start, stop in pairwise(edges)]


def lines(texts: list[Any], field: str = "text") -> bytes:
    """JSON lines with these texts in a field."""
    return b"".join(json.dumps({"id": n, field: text}).encode() + b"\n" for n, text in enumerate(texts))


def give(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Bytes on standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


def check_operator(name: str, record: Any) -> None:
    """Torch's own checks of a custom operator and of its backward pass, on a record."""
    operator = OPERATORS[name]
    results = operator.forward(record)
    kept, shown = results[operator.saved], results[: len(results) - operator.hidden]
    grad = [torch.randn_like(x) for x in shown]
    torch.library.opcheck(operator.registered_backward, (grad, kept, *operator.packed(record)))
    for x in operator.slopes(record):
        x.requires_grad_()
    torch.library.opcheck(operator.registered, tuple(operator.packed(record)))
