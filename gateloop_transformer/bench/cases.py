"""The cases to measure: each gives candidates by name, ours and peers, to be run in turn.

Streaming bound: a plain torch addition moves three streams of numbers; a kernel that must move n is bound by n/3 of its
time. "fresh" lets the addition allocate its result as an operator must, "reused" writes to memory that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.bench.peers import Peer, PeerFailed
from gateloop_transformer.bench.timing import seconds
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.simple_gate_loop import SimpleGateLoopLayer
from gateloop_transformer.model import Transformer
from gateloop_transformer.ops.channel_loop import channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.linear_scan import linear_scan

Shape = tuple[int, int, int]
Candidates = dict[str, Callable[[], float]]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """A row of the table: what is timed, shape (B, T, D), dtype, and whether the backward pass is timed too."""

    group: str
    what: str
    shape: Shape
    dtype: str
    backward: bool


def passes(
    call: Callable[..., Any], tensors: list[Tensor], backward: bool, parameters: Iterable[Tensor] = ()
) -> Callable[[], float]:
    """Time `call` without gradients, or with the gradients of all `tensors` and of its own `parameters`."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                call(*tensors)

        return seconds(forward)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    sources = [*leaves, *parameters]
    grads: list[Tensor] = []

    def both() -> None:
        y = call(*leaves)
        y = y[0] if isinstance(y, tuple) else y
        if not grads:
            grads.append(torch.randn_like(y))
        torch.autograd.grad(y, sources, grads[0])

    return seconds(both)


def streaming(shape: Shape, dtype: torch.dtype, streams: int) -> Candidates:
    """Candidates that time an addition, for as many streams as the kernel must move."""
    x, y, out = (torch.ones(shape, dtype=dtype) for _ in range(3))
    fresh, reused = seconds(lambda: torch.add(x, y)), seconds(lambda: torch.add(x, y, out=out))
    return {"bound, fresh": lambda: fresh() * streams / 3, "bound, reused": lambda: reused() * streams / 3}


def _jax_scan(tensors: list[Tensor], backward: bool) -> Callable[[], float]:
    import jax

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(a: Any, x: Any) -> Any:
        return jax.lax.associative_scan(combine, (a, x), axis=1)[1]

    def both(a: Any, x: Any, g: Any) -> Any:
        return jax.vjp(scan, a, x)[1](g)

    arrays = [jax.numpy.asarray(tensor.numpy()) for tensor in tensors]
    function = jax.jit(both if backward else scan)
    arguments = [*arrays, arrays[1]] if backward else arrays
    return seconds(lambda: jax.block_until_ready(function(*arguments)))


def _torch_scan(a: Tensor, x: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    result: Tensor = associative_scan(combine, (a, x), dim=1, combine_mode="generic")[1]
    return result


def operators(case: Case, peer: Peer | None) -> Iterator[tuple[str, Callable[[], Callable[[], float]]]]:
    """Candidates for an operator at head size 1, built one by one: peers may lack what they need."""
    (B, T, D), dtype = case.shape, DTYPES[case.dtype]
    plain = case.dtype == "f32"
    remote = peer if plain else None
    if case.what == "linear_scan":
        tensors = [torch.rand(case.shape).to(dtype), torch.randn(case.shape).to(dtype)]
        for name in ("numba", "chunkwise"):
            yield name, partial(passes, partial(linear_scan, backend=name), tensors, case.backward)
        if plain:
            yield "jax.lax", partial(_jax_scan, tensors, case.backward)
            yield "torch scan", partial(passes, _torch_scan, tensors, case.backward)
            gru = torch.nn.GRU(D, D, batch_first=True)
            if T <= 4096:
                yield "nn.GRU", partial(passes, lambda x: gru(x)[0], tensors[1:], case.backward)
        if remote is not None:
            yield "mambapy", partial(remote.make, "mambapy", case.shape, case.dtype, case.backward)
        return
    qkv, z = torch.randn(B, T, 3 * D).to(dtype), torch.randn(B, T, 2 * D).to(dtype)
    if case.what == "simple_gate_loop":
        for name in ("numba", "chunkwise"):
            yield name, partial(passes, partial(simple_gate_loop, backend=name), [qkv], case.backward)
        if remote is not None:
            yield "original", partial(remote.make, "original", case.shape, case.dtype, case.backward)
        return
    for name in ("numba", "chunkwise"):
        call = partial(channel_gate_loop, gate="polar", backend=name)
        yield name, partial(passes, call, [qkv, z], case.backward)
    if remote is not None:
        yield "original", partial(remote.make, "gate operator", case.shape, case.dtype, case.backward)


STREAMS = {"linear_scan": (3, 8), "simple_gate_loop": (4, 11), "channel_gate_loop": (6, 17)}


def heads(case: Case) -> Candidates:
    """Candidates for the gate loop at head size 64, next to causal attention of the same width."""
    B, T, D = case.shape
    dtype = DTYPES[case.dtype]
    qkv = [torch.randn(B, T, D // 64, 64).to(dtype) for _ in range(3)]
    gates = [torch.rand(B, T, D // 64) * 0.7 for _ in range(2)]
    results = {}
    for name in ("numba", "chunkwise"):
        if name == "numba" or T <= 16384:

            def loop(q: Tensor, k: Tensor, v: Tensor, re: Tensor, im: Tensor, name: str = name) -> Any:
                return gate_loop(q, k, v, (re, im), backend=name)

            results[name] = passes(loop, [*qkv, *gates], case.backward)
    if T <= 16384:

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        results["attention"] = passes(attention, qkv, case.backward)
    return results


LAYERS: dict[str, tuple[type, dict[str, Any]]] = {
    "SimpleGateLoopLayer": (SimpleGateLoopLayer, {}),
    "GateLoopedAttention": (GateLoopedAttention, {}),
    "GateLoopedAttention, heads=8": (GateLoopedAttention, {"heads": 8}),
}


# Lengths up to which Hugging Face's Mamba ends in reasonable time: step by step, its backward pass takes T² time. It is
# not timed in bfloat16: its scan stays in float32.
MAMBA: dict[str, tuple[int, dict[str, Any]]] = {
    "HF Mamba": (256, {}),
    "HF Mamba, pscan": (1024, {"use_mambapy": True}),
}


def layers(case: Case, peer: Peer | None) -> Iterator[tuple[str, Callable[[], Callable[[], float]]]]:
    """Candidates for our layer, the original's, and a Mamba layer of equal width, as it is and with a scan."""
    kind, options = LAYERS[case.what]
    layer = kind(case.shape[2], **options)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
            y: Tensor = layer(x)
        return y

    yield "ours", partial(passes, call, [torch.randn(case.shape)], case.backward, list(layer.parameters()))
    if peer is not None:
        arguments = case.shape, case.dtype, case.backward
        yield "original", partial(peer.make, kind.__name__, *arguments, **options)
        for name, (longest, choice) in MAMBA.items():
            if case.shape[1] <= longest and case.dtype == "f32":
                yield name, partial(peer.make, "mamba", *arguments, **choice)


class _NoRecurrence(GateLoopedAttention):
    """The layer with plain products in place of the recurrence."""

    def _channels(self, x: Tensor, mixed: Tensor, state: Any, layout: Any) -> Any:
        q, k, v = self.to_qkv(mixed).chunk(3, -1)
        first, second = self._projections(mixed, q.dtype).chunk(2, -1)
        y = q * k * v * first * second
        if self.to_gates is not None:
            y = y * self.to_gates(x)
        return self.to_out(y), (y[:, -1], y[:, -1])


def attention_model(D: int) -> Transformer:
    """A model with attention in every block, whose head width gives it as many parameters as the gate loop model."""
    return Transformer(D, num_tokens=256, depth=6, use_gate_looped_attn=False, heads=8, dim_head=(7 * D + 20) // 40)


def _step(model: torch.nn.Module, case: Case) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(256, (case.shape[0], case.shape[1] + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
            loss = model(ids, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return seconds(step)


def steps(case: Case, peer: Peer | None) -> Iterator[tuple[str, Callable[[], Callable[[], float]]]]:
    """Candidates for a training step at width D and depth 6: ours, without recurrence, attention, and the original."""
    D = case.shape[2]

    def without() -> Callable[[], float]:
        model = Transformer(D, num_tokens=256, depth=6)
        for module in model.modules():
            if type(module) is GateLoopedAttention:
                module.__class__ = _NoRecurrence
        return _step(model, case)

    yield "ours", lambda: _step(Transformer(D, num_tokens=256, depth=6), case)
    yield "no recurrence", without
    yield "attention", lambda: _step(attention_model(D), case)
    if peer is not None and case.dtype == "f32":
        yield "original", partial(peer.make, "model", case.shape, case.dtype, True, depth=6)


# Tokens read before the decoding that is "far", by what the row is called.
FAR = {f"a token, depth 6, far: after {tokens:,}": tokens for tokens in (1_000_000, 20_000)}


def _after(model: Transformer, tokens: int) -> Any:
    """The state after reading `tokens` tokens in blocks; as they are many, in bfloat16, with states in float32."""
    state = None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for block in torch.randint(256, (1, tokens)).split(4096, 1):
            _, state = model(block, state, return_state=True)
    return state


def decoding(case: Case) -> Candidates:
    """Candidates for a token after 100 and after many others, and for the matrix products of a step alone."""
    D = case.shape[2]
    model = Transformer(D, num_tokens=256, depth=6).eval()
    token = torch.tensor([[65]])
    near, far = (_after(model, tokens) for tokens in (100, FAR[case.what]))
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    vectors = [torch.randn(1, m.in_features) for m in matrices]

    def decode(state: Any) -> Callable[[], float]:
        held = [state]

        def run() -> None:
            with torch.inference_mode():
                _, held[0] = model(token, held[0], return_state=True)

        return seconds(run)

    def products() -> None:
        with torch.inference_mode():
            for matrix, vector in zip(matrices, vectors, strict=True):
                matrix(vector)

    return {"near": decode(near), "far": decode(far), "products": seconds(products)}


def every_case(quick: bool) -> list[Case]:
    """All rows; if `quick`, without the expensive ones."""
    shapes: list[Shape] = [(1, 1024, 512), (1, 4096, 512)]
    shapes += [] if quick else [(8, 2048, 512), (1, 65536, 512)]
    cases = [
        Case("operators", what, shape, dtype, backward)
        for what in STREAMS
        for shape in shapes
        for dtype in DTYPES
        for backward in (False, True)
    ]
    lengths = (256, 1024, 4096) if quick else (256, 1024, 4096, 16384, 65536, 262144)
    cases += [Case("heads", "gate_loop, head size 64", (1, T, 512), "f32", True) for T in lengths]
    longest = {"SimpleGateLoopLayer": 65536, "GateLoopedAttention": 16384, "GateLoopedAttention, heads=8": 1024}
    cases += [
        Case("layers", what, (1, T, 512), dtype, True)
        for what in LAYERS
        for T in ((256, 1024) if quick else (256, 1024, 4096, 16384, 65536))
        if longest[what] >= T
        for dtype in DTYPES
    ]
    cases += [
        Case("training", "step of 4096 tokens", (4096 // T, T, 512), dtype, True)
        for T in ((1024,) if quick else (256, 1024, 4096))
        for dtype in DTYPES
    ]
    return [*cases, Case("decoding", list(FAR)[quick], (1, 1, 512), "f32", False)]


def candidates(case: Case, peer: Peer | None) -> tuple[Candidates, dict[str, str]]:
    """The candidates to run in turn, and the reason for each that could not be built."""
    if case.group == "heads":
        return heads(case), {}
    if case.group == "decoding":
        return decoding(case), {}
    if peer is not None:
        peer.clear()
    builders = {"operators": operators, "layers": layers, "training": steps}[case.group](case, peer)
    results: Candidates = {}
    failures = {}
    for name, build in builders:
        try:
            run = build()
            # The first run compiles, and shows what a peer cannot do.
            run()
            results[name] = run
        except (PeerFailed, ImportError, RuntimeError, NotImplementedError, TypeError) as error:  # noqa: PERF203
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    if case.group == "operators":
        results |= streaming(case.shape, DTYPES[case.dtype], STREAMS[case.what][case.backward])
    return results, failures
