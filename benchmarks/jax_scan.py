"""Time and memory of training steps in JAX, against the same built on jax.lax.associative_scan. Writes jax.{json,md}.

python benchmarks/jax_scan.py

Candidates of a row run in turn. Memory is what XLA allots for a compiled step besides its arguments and results.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from gateloop_transformer.bench.report import about, about_line
from gateloop_transformer.bench.timing import interleaved, seconds
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.jax import GateLoopedAttention, Transformer, channel_gate_loop, linear_scan, simple_gate_loop

RESULTS = Path(__file__).parent.parent / "docs" / "results"
T, D, DEPTH, BUDGET = 4096, 512, 2, 20.0
OURS, PLAIN, AGAIN = "gateloop", "associative_scan", "associative_scan, recomputed"
BOUND, NONE = "bound", "no recurrence"


def associative(a: Any, x: Any) -> Any:
    """All states, as JAX's own scan gives them."""

    def combine(early: Any, late: Any) -> Any:
        return early[0] * late[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(combine, (a, x), axis=1)[1]


def scanned(
    qkv: Any, projections: Any, initial: Any = None, *, gate: str, bias: Any = None, swish: Any = None, **_: Any
) -> Any:
    """`channel_gate_loop` as one writes it with complex numbers and associative_scan; gradients are JAX's."""
    q, k, v = jnp.split(qkv, 3, -1)
    pairs = projections.reshape(*projections.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    x = k * v
    if gate == "polar":
        z = jax.lax.complex(first, second)
        a = jax.nn.sigmoid(jnp.abs(z)) * jnp.exp(1j * jnp.angle(z))
    else:
        first, second = first + bias[0], second + bias[1]
        a = jax.nn.sigmoid(first) * jnp.exp(1j * second)
        x = x * jnp.exp(0.5 * jax.nn.log_sigmoid(-first)) * jnp.sqrt(1 + jax.nn.sigmoid(first))
    h = associative(a, x.astype(jnp.complex64))
    y = q * h.real
    final = h[:, -1]
    return y if swish is None else y * jax.nn.silu(swish), (final.real, final.imag)


def left_out(
    qkv: Any, projections: Any, initial: Any = None, *, gate: str, bias: Any = None, swish: Any = None, **_: Any
) -> Any:
    """What surrounds the recurrence: all of its arguments are read, and it costs nothing."""
    q, k, v = jnp.split(qkv, 3, -1)
    pairs = projections.reshape(*projections.shape[:-1], -1, 2)
    y = q * (k * v + pairs[..., 0] + pairs[..., 1]) * jax.nn.silu(swish)
    return y, (y[:, -1], y[:, -1])


def simple(qkva: Any) -> Any:
    """`simple_gate_loop` with associative_scan."""
    q, kv, a = jnp.split(qkva, 3, -1)
    return q * associative(jax.nn.sigmoid(a), kv)


@contextlib.contextmanager
def written_with(scan: Callable[..., Any] | None) -> Iterator[None]:
    """Layers use another function for their recurrence meanwhile."""
    if scan is None:
        yield
        return
    with mock.patch("gateloop_transformer.jax.layers.channel_gate_loop", scan):
        yield


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose inner values are computed again for the gradient."""

    def run(
        qkv: Any, projections: Any, initial: Any = None, *, bias: Any = None, swish: Any = None, **rest: Any
    ) -> Any:
        def inner(qkv: Any, projections: Any, bias: Any, swish: Any) -> Any:
            return function(qkv, projections, bias=bias, swish=swish, gate=rest["gate"])

        return jax.checkpoint(inner)(qkv, projections, bias, swish)

    return run


class Case(NamedTuple):
    """A row: what, its batch, streams of T·D numbers that must be moved (0: not counted), and its candidates."""

    what: str
    batch: int
    streams: int
    candidates: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def gradient(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The gradients of the first `count` arguments through all that `function` gives."""
    return jax.grad(lambda *arguments: jnp.square(function(*arguments)).sum(), argnums=tuple(range(count)))


def normal(seed: int, *shape: int) -> Any:
    """Numbers to compute with."""
    return jax.random.normal(jax.random.key(seed), shape)


def operators(B: int) -> Iterator[Case]:
    """The recurrences by themselves."""
    a = jax.nn.sigmoid(normal(0, B, T, D) + 3) * jnp.exp(1j * normal(1, B, T, D))
    x = jax.lax.complex(normal(2, B, T, D), normal(3, B, T, D))

    def energy(scan: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda a, x: jnp.square(jnp.abs(scan(a, x))).sum(), argnums=(0, 1))

    yield Case(
        "linear_scan, complex", B, 24, {OURS: (energy(linear_scan), (a, x)), PLAIN: (energy(associative), (a, x))}
    )
    qkv, projections, swish = normal(4, B, T, 3 * D), normal(5, B, T, 2 * D), normal(6, B, T, D)
    bias = jnp.full(D, 3.0), jnp.zeros(D)
    for gate in ("ring", "polar"):
        given = (qkv, projections, swish, *(bias if gate == "ring" else ()))

        def loop(function: Callable[..., Any], gate: str = gate, count: int = len(given)) -> Callable[..., Any]:
            def y(qkv: Any, projections: Any, swish: Any, *bias: Any) -> Any:
                return function(qkv, projections, gate=gate, swish=swish, bias=bias or None)[0]

            return gradient(y, count)

        forms = {OURS: channel_gate_loop, PLAIN: scanned, AGAIN: recomputed(scanned)}
        # Read twice: q, k, v, two projections, s; read: dy; written: y and six gradients.
        candidates = {name: (loop(function), given) for name, function in forms.items()}
        yield Case(f"gate loop, {gate} gates", B, 20, candidates)
    ours = gradient(lambda x: simple_gate_loop(x)[0], 1)
    yield Case("simple gate loop", B, 11, {OURS: (ours, (qkv,)), PLAIN: (gradient(simple, 1), (qkv,))})


def layers(B: int) -> Iterator[Case]:
    """Training steps of a layer and of a model: the products of matrices are the same in all."""
    recipe = TransformerConfig.recommended(D, DEPTH, context=T)
    options = {name: getattr(recipe, name) for name in ("gate", "conv_size", "conv_silu", "qkv_bias", "max_memory")}
    described = {"recommended": GateLoopedAttention(D, **options), "the original's": GateLoopedAttention(D)}
    forms = {NONE: left_out, OURS: None, PLAIN: scanned, AGAIN: recomputed(scanned)}
    for name, layer in described.items():
        given = layer.init(jax.random.key(0)), normal(1, B, T, D)

        def step(scan: Any, layer: Any = layer) -> Callable[..., Any]:
            def energy(params: Any, x: Any) -> Any:
                with written_with(scan):
                    return jnp.square(layer.apply(params, x)).sum()

            return jax.grad(energy, argnums=(0, 1))

        yield Case(f"layer, {name}", B, 0, {form: (step(scan), given) for form, scan in forms.items()})
    model = Transformer.of(recipe)
    params, ids = model.init(jax.random.key(0)), jax.random.randint(jax.random.key(1), (B, T + 1), 0, 256)

    def train(scan: Any) -> Callable[..., Any]:
        def loss(params: Any, ids: Any) -> Any:
            with written_with(scan):
                return model.loss(params, ids)

        def update(params: Any, ids: Any) -> Any:
            slopes = jax.grad(loss)(params, ids)
            return jax.tree.map(lambda x, slope: x - 1e-3 * slope, params, slopes)

        return update

    yield Case(f"model of {DEPTH} layers", B, 0, {form: (train(scan), (params, ids)) for form, scan in forms.items()})


def measure(case: Case) -> dict[str, Any]:
    """Seconds and bytes of each candidate."""
    runs, memory = {}, {}
    for name, (function, given) in case.candidates.items():
        compiled = jax.jit(function).lower(*given).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        runs[name] = seconds(lambda compiled=compiled, given=given: jax.block_until_ready(compiled(*given)))  # type: ignore[misc]
    if case.streams:
        x = normal(0, case.batch, T, D)
        add = jax.jit(jnp.add)
        three = seconds(lambda: jax.block_until_ready(add(x, x)))
        runs[BOUND] = lambda: three() * case.streams / 3
    times = interleaved(runs, BUDGET, most=15)
    return {
        "what": case.what,
        "shape": [case.batch, T, D],
        "seconds": {name: value._asdict() for name, value in times.items()},
        "memory": memory,
    }


def page(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = [
        "# JAX on the CPU",
        "",
        "Generated by benchmarks/jax_scan.py; not to be edited.",
        "",
        f"{about_line(results)}; commit {results['commit']}.",
        "",
        f"Training steps (value and gradients) at T = {T:,} and width {D}, float32, against the same step with",
        "`jax.lax.associative_scan` in place of the recurrence, differentiated by JAX: as it is, and computed again",
        "for the gradient (`jax.checkpoint`). Median milliseconds (least to most), and MiB that XLA allots besides",
        "arguments and results; in bold the ratios to ours. Candidates of a row ran in turn. Bound: an addition of the",
        "same run, scaled to the bytes that must be moved. In layers and models most of the time goes into products of",
        "matrices, the same in all columns: *no recurrence* leaves it out.",
        "",
        f"| step | batch | {BOUND} | {NONE} | {OURS} | {PLAIN} | {AGAIN} |",
        "| --- " * 7 + "|",
    ]
    for row in results["rows"]:
        cells = [row["what"], str(row["shape"][0])]
        cells += [_cell(row, name) for name in (BOUND, NONE, OURS, PLAIN, AGAIN)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return ""
    times, ours = row["seconds"][name], row["seconds"][OURS]["median"]
    text = f"{times['median'] * 1e3:.1f} ({times['least'] * 1e3:.1f} to {times['most'] * 1e3:.1f})"
    if name == BOUND:
        return text
    text += f"; {row['memory'][name] / 2**20:.0f} MiB"
    if name not in (OURS, NONE):
        text += f" **{times['median'] / ours:.2f}, {row['memory'][name] / row['memory'][OURS]:.2f}**"
    return text


def main() -> None:
    """Measure everything and write both files."""
    rows = []
    for B in (1, 4):
        for case in [*operators(B), *layers(B)]:
            rows.append(measure(case))
            times = {name: round(value["median"] * 1e3, 1) for name, value in rows[-1]["seconds"].items()}
            print(case.what, B, times, {name: size >> 20 for name, size in rows[-1]["memory"].items()}, flush=True)
    results = {**about(), "rows": rows}
    (RESULTS / "jax.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "jax.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
