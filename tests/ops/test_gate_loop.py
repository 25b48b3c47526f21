"""Laws of the gate loop operator, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import processes
import pytest
import torch
from cases import (
    DIRECTIONS,
    INTERPRETED,
    KINDS,
    LENGTHS,
    SIZES,
    Loop,
    assert_equal,
    cast,
    check_operator,
    compiled,
    make_loop,
    naive_gate_loop,
    nan_filled_memory,
    pieces,
    rms_ratio,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateloop_transformer.ops import gate_loop
from gateloop_transformer.ops.dispatch import TABLE
from gateloop_transformer.ops.pairs import split
from gateloop_transformer.ops.recurrences import GateLoop

# JAX compiles every shape for seconds: the laws run at one of its shapes, the comparisons below at all.
EACH = [
    (name, size)
    for name in TABLE
    for size in SIZES
    if (name, size) != ("jax", "K1V1") and ("H9" not in size or name == "numba")
]


def comparisons() -> list[Any]:
    """Everything with everything; for those that take seconds for each case, every option somewhere."""
    cases = []
    for T in LENGTHS:
        for s, size in enumerate(SIZES):
            for d, direction in enumerate(DIRECTIONS):
                for n, kind in enumerate(KINDS):
                    id = f"{T}-{size}-{direction}-{kind}"
                    if "H9" in size and "channel" in kind:
                        continue
                    fast = ("numba",) if "H9" in size else ("numba", "chunkwise")
                    cases += [pytest.param(name, T, size, direction, kind, id=f"{name}-{id}") for name in fast]
                    if (
                        "H9" not in size
                        and n == (LENGTHS.index(T) + 2 * d + s) % 4
                        and (d + s) % 2 == LENGTHS.index(T) % 2
                    ):
                        cases.append(pytest.param("jax", T, size, direction, kind, id=f"jax-{id}"))
                        marks = [pytest.mark.slow] * (T in LENGTHS[-2:])
                        cases.append(pytest.param("triton", T, size, direction, kind, id=f"triton-{id}", marks=marks))
    return cases


def run(backend: str, reverse: bool = False) -> Callable[..., Any]:
    return partial(gate_loop, reverse=reverse, backend=backend)


def parts(args: Loop) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the gates as two real tensors."""
    q, k, v, a, _ = args
    return q, k, v, a.real.clone(), a.imag.clone() if a.is_complex() else torch.zeros_like(a)


def test_every_backend_is_compared() -> None:
    assert set(TABLE) == {"eager", *(case.values[0] for case in comparisons())}


@pytest.mark.parametrize(("backend", "T", "size", "direction", "kind"), comparisons())
def test_backends_equal_eager(backend: str, T: int, size: str, direction: str, kind: str) -> None:
    args = make_loop(2, T, **SIZES[size], **KINDS[kind])
    results = values_and_gradients(run(backend, DIRECTIONS[direction]), args)
    assert_equal(results, eager(T, size, direction, kind))


@cache
def eager(T: int, size: str, direction: str, kind: str) -> list[Tensor]:
    """What every other backend is compared with."""
    args = make_loop(2, T, **SIZES[size], **KINDS[kind])
    return values_and_gradients(run("eager", DIRECTIONS[direction]), args)


@pytest.mark.parametrize(("K", "V", "per_channel"), [(64, 64, False), (70, 2, False), (17, 33, True)])
@pytest.mark.parametrize("backend", ["chunkwise", "numba"])
def test_equals_eager_at_the_sizes_that_change_chunks(backend: str, K: int, V: int, per_channel: bool) -> None:
    args = make_loop(1, 150, 2, K, V, per_channel=per_channel)
    assert_equal(*(values_and_gradients(run(name), args) for name in (backend, "eager")))


def test_a_single_head_that_fills_its_vectors(backend: str) -> None:
    args = make_loop(1, 20, 1, 16, 16)
    assert_equal(*(values_and_gradients(run(name), args) for name in (backend, "eager")))


def test_chunkwise_in_groups_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE["chunkwise"], "_GROUP_ELEMENTS", 1)
    for reverse in (False, True):
        args = make_loop(T=100)
        assert_equal(*(values_and_gradients(run(name, reverse), args) for name in ("chunkwise", "eager")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_eager_is_the_formula_and_its_gradient_is_autograds(kind: str, reverse: bool) -> None:
    args = make_loop(T=33, **KINDS[kind])

    def eager(q: Tensor, k: Tensor, v: Tensor, re: Tensor, im: Tensor) -> Any:
        return gate_loop(q, k, v, (re, im), reverse=reverse, backend="eager")

    naive = partial(naive_gate_loop, reverse=reverse)
    assert_equal(*(values_and_gradients(function, parts(args)) for function in (eager, naive)), 1e-12)


@pytest.mark.parametrize(("K", "V", "kind"), [(2, 1, "complex-head"), (1, 2, "real-channel"), (1, 1, "complex-head")])
def test_gradcheck(backend: str, K: int, V: int, kind: str) -> None:
    args = make_loop(1, 17, 1, K, V, **KINDS[kind], seed=3)
    assert torch.autograd.gradcheck(run(backend), [x.requires_grad_() for x in args], fast_mode=backend in INTERPRETED)


def test_gradcheck_with_a_complex_state_on_real_gates(backend: str) -> None:
    args = make_loop(1, 17, 1, 2, 1, is_complex=False)
    args = args._replace(initial=torch.randn(1, 1, 2, 1, dtype=torch.complex128))
    assert torch.autograd.gradcheck(run(backend), [x.requires_grad_() for x in args], fast_mode=backend in INTERPRETED)


@pytest.mark.parametrize(("gates", "initial"), [("complex", "real"), ("real", "complex")])
def test_gates_and_initial_state_may_be_real_and_complex(backend: str, gates: str, initial: str) -> None:
    args = make_loop(is_complex=gates == "complex")
    start = make_loop(is_complex=initial == "complex", seed=1).initial
    both = values_and_gradients(run("eager"), [*args[:3], args.gates.to(torch.complex128), start.to(torch.complex128)])
    results = values_and_gradients(run(backend), [*args[:3], args.gates, start])
    expected = [x if x.ndim == like.ndim else x[..., 0] for x, like in zip(both, results, strict=True)]
    assert_equal(results, expected)


def test_a_tuple_of_parts_is_the_complex_tensor(backend: str) -> None:
    q, k, v, a, s = make_loop()
    y, (real, imaginary) = gate_loop(q, k, v, (a.real, a.imag), (s.real, s.imag), backend=backend)
    expected = gate_loop(q, k, v, a, s, backend=backend)
    assert_equal([y, torch.complex(real, imaginary)], expected, 0)


def test_no_initial_state_is_zero(backend: str) -> None:
    q, k, v, a, s = make_loop()
    none = values_and_gradients(run(backend), [q, k, v, a])
    zero = values_and_gradients(run(backend), [q, k, v, a, torch.zeros_like(s)])
    assert_equal(none, zero[:-1])


@pytest.mark.parametrize("leaf", range(5))
@pytest.mark.parametrize("result", [0, 1])
def test_each_gradient_alone_is_that_of_all(leaf: int, result: int) -> None:
    def gradient(wanted: list[int]) -> Tensor:
        args = [x.clone().requires_grad_(n in wanted) for n, x in enumerate(make_loop())]
        gate_loop(*args)[result].abs().sum().backward()
        return torch.zeros_like(args[leaf]) if args[leaf].grad is None else args[leaf].grad

    assert_equal([gradient([leaf])], [gradient([0, 1, 2, 3, 4])], 0)


# Each with real and with complex gates, per head and per channel in turn.
CHECKED = [
    (backend, size, kind)
    for n, (backend, size) in enumerate(
        [("eager", "K1V1"), ("chunkwise", "K3V5"), ("numba", "K1V1"), ("numba", "K3V5"), ("numba", "H9K3V5")]
    )
    for kind in list(KINDS)[n % 2 :: 2]
]


@pytest.mark.parametrize(("backend", "size", "kind"), CHECKED)
def test_opcheck(backend: str, size: str, kind: str) -> None:
    q, k, v, a, s = make_loop(2, 9, **SIZES[size], **KINDS[kind])
    check_operator("gate_loop", GateLoop(q, k, v, split(a), split(s), False, backend))


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V"), [(2, 0, 3, 2, 4), (0, 5, 3, 2, 4), (0, 0, 1, 1, 1), (2, 5, 3, 2, 0)]
)
def test_nothing_in_is_nothing_out_and_the_state_stays(backend: str, B: int, T: int, H: int, K: int, V: int) -> None:
    args = [x.requires_grad_() for x in make_loop(B, T, H, K, V)]
    y, final = gate_loop(*args, backend=backend)
    assert y.shape == (B, T, H, V)
    assert torch.equal(final, args[4])
    assert final.data_ptr() != args[4].data_ptr() or not final.numel()
    (y.sum() + final.real.sum()).backward()
    assert torch.equal(args[4].grad, torch.ones_like(args[4]))
    assert not any(x.grad.any() for x in args[:4])
    assert not gate_loop(*args[:4], backend=backend)[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "chunkwise", "numba"])
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 70), max_size=5))
def test_a_split_sequence_carries_its_state(backend: str, kind: str, cuts: list[int]) -> None:
    args = make_loop(T=70, **KINDS[kind])
    expected = gate_loop(*args, backend=backend)
    state, ys = args.initial, []
    for piece in zip(*(pieces(x, cuts) for x in args[:4]), strict=True):
        y, state = gate_loop(*piece, state, backend=backend)
        ys.append(y)
    assert_equal([torch.cat(ys, 1), state], expected)


@pytest.mark.parametrize(("backend", "size"), EACH)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_split_sequence_carries_its_gradient(backend: str, size: str, reverse: bool) -> None:
    def split(*args: Tensor) -> tuple[Tensor, Tensor]:
        order = [slice(0, 21), slice(21, 42)][:: -1 if reverse else 1]
        first, state = gate_loop(*(x[:, order[0]] for x in args[:4]), args[4], reverse=reverse, backend=backend)
        last, state = gate_loop(*(x[:, order[1]] for x in args[:4]), state, reverse=reverse, backend=backend)
        return torch.cat([last, first] if reverse else [first, last], 1), state

    args = make_loop(T=42, **SIZES[size])
    assert_equal(values_and_gradients(split, args), values_and_gradients(run(backend, reverse), args))


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_the_whole(kind: str) -> None:
    args = make_loop(T=33, **KINDS[kind])
    state, ys = args.initial, []
    for t in range(33):
        y, state = gate_loop(*(x[:, t : t + 1] for x in args[:4]), state)
        ys.append(y)
    assert_equal([torch.cat(ys, 1), state], gate_loop(*args))


@pytest.mark.parametrize(("backend", "size"), EACH)
def test_the_future_does_not_reach_the_past(backend: str, size: str) -> None:
    args = [x.requires_grad_() for x in make_loop(**SIZES[size])]
    y, _ = gate_loop(*args, backend=backend)
    changed = [torch.cat([x[:, :13], x[:, 13:] * 0.5 + 0.1], 1) for x in args[:4]]
    assert_equal([gate_loop(*changed, args[4], backend=backend)[0][:, :13]], [y[:, :13]], 1e-14)
    y[:, :13].sum().backward()
    assert all(not x.grad[:, 13:].any() and x.grad[:, :13].any() for x in args[:4])


@pytest.mark.parametrize(("backend", "size"), EACH)
def test_gates_of_one_are_a_cumulative_sum(backend: str, size: str) -> None:
    q, k, v, a, _ = make_loop(**SIZES[size])
    total = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    expected = torch.einsum("bthk,bthkv->bthv", q, total), total[:, -1]
    assert_equal(gate_loop(q, k, v, torch.ones_like(a.real), backend=backend), expected)


def test_gates_of_zero_see_only_their_own_step(backend: str) -> None:
    q, k, v, a, s = make_loop()
    y, final = gate_loop(q, k, v, torch.zeros_like(a), s, backend=backend)
    own = (q * k).sum(-1, keepdim=True) * v
    assert_equal([y, final.real], [own, k[:, -1, ..., None] * v[:, -1, ..., None, :]])


def test_reverse_is_flip(backend: str) -> None:
    *steps, initial = make_loop()
    y, final = gate_loop(*(x.flip(1) for x in steps), initial, backend=backend)
    assert_equal(gate_loop(*steps, initial, reverse=True, backend=backend), [y.flip(1), final])


def test_batch_rows_are_independent(backend: str) -> None:
    args = make_loop(2)
    whole = gate_loop(*args, backend=backend)
    for row in range(2):
        alone = gate_loop(*(x[row : row + 1] for x in args), backend=backend)
        assert_equal(alone, [x[row : row + 1] for x in whole], 1e-13)


@pytest.mark.parametrize(
    ("size", "kind"), [("K3V5", "complex-head"), ("K3V5", "real-channel"), ("K1V1", "complex-head")]
)
def test_float32_has_a_relative_error_of_1e_5(backend: str, size: str, kind: str) -> None:
    args = cast(make_loop(T=70 if backend in INTERPRETED else 500, **SIZES[size], **KINDS[kind]), torch.float32)
    expected = values_and_gradients(run("eager"), cast(args, torch.float64))
    for x, reference in zip(values_and_gradients(run(backend), args), expected, strict=True):
        assert x.dtype == torch.float32
        assert rms_ratio(x, reference) <= 1e-5


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("backend", "size"), EACH)
def test_half_precision_errs_at_most_twice_as_much_as_the_formula_in_it(
    backend: str, size: str, dtype: torch.dtype
) -> None:
    args = [x.to(dtype) for x in parts(make_loop(T=63, **SIZES[size]))]

    def ours(q: Tensor, k: Tensor, v: Tensor, re: Tensor, im: Tensor) -> Any:
        return gate_loop(q, k, v, (re, im), backend=backend)

    exact = values_and_gradients(naive_gate_loop, [x.double() for x in args])
    naive = values_and_gradients(naive_gate_loop, args)
    results = values_and_gradients(ours, args)
    assert results[0].dtype == results[3].dtype == dtype
    assert results[1].dtype == torch.float32
    for x, rough, reference in zip(results, naive, exact, strict=True):
        assert rms_ratio(x, reference) <= 2 * rms_ratio(rough, reference) + torch.finfo(dtype).eps


@pytest.mark.parametrize("gates", [torch.float32, torch.float64])
@pytest.mark.parametrize("initial", [torch.float32, torch.float64])
def test_gates_and_states_may_be_wider_than_the_values(backend: str, gates: torch.dtype, initial: torch.dtype) -> None:
    q, k, v, a, s = make_loop(is_complex=False)
    args = [q.bfloat16(), k.bfloat16(), v.bfloat16(), a.to(gates), s.to(initial)]
    results = values_and_gradients(run(backend), args)
    assert [x.dtype for x in results] == [torch.bfloat16, gates, *(x.dtype for x in args)]
    exact = values_and_gradients(run("eager"), [x.double() for x in args])
    assert all(rms_ratio(x, reference) < 0.01 for x, reference in zip(results, exact, strict=True))


@pytest.mark.parametrize(("backend", "size"), EACH)
def test_strides_do_not_matter(backend: str, size: str) -> None:
    args = make_loop(2, **SIZES[size])
    expected = values_and_gradients(run(backend), args)

    def strided(*args: Tensor) -> Any:
        turned = [torch.stack([x, x], -1).transpose(0, -1).contiguous().transpose(0, -1)[..., 0] for x in args]
        assert not any(x.is_contiguous() for x in turned)
        return gate_loop(*turned, backend=backend)

    assert_equal(values_and_gradients(strided, args), expected, 1e-13)


def test_expanded_and_sliced_inputs(backend: str) -> None:
    q, k, v, a, s = make_loop(B=1)

    def expanded(*args: Tensor) -> Any:
        return gate_loop(*(x.expand(2, *x.shape[1:]) for x in args), backend=backend)

    def repeated(*args: Tensor) -> Any:
        return gate_loop(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in args), backend=backend)

    assert_equal(*(values_and_gradients(f, (q, k, v, a, s)) for f in (expanded, repeated)), 1e-13)
    every = [torch.cat([x, x], 1)[:, ::2] for x in (q, k, v, a)]
    assert_equal(gate_loop(*every, s, backend=backend), gate_loop(*(x.clone() for x in every), s, backend=backend))


@pytest.mark.parametrize(("backend", "size"), EACH)
@pytest.mark.parametrize("reverse", [False, True])
def test_uninitialised_memory_is_never_read(backend: str, size: str, reverse: bool) -> None:
    args = make_loop(**SIZES[size])
    expected = values_and_gradients(run(backend, reverse), args)
    with nan_filled_memory():
        results = values_and_gradients(run(backend, reverse), args)
    assert_equal(results, expected, 0)


def test_arguments_are_not_modified(backend: str) -> None:
    args = [x.requires_grad_() for x in make_loop()]
    before = [x.detach().clone() for x in args]
    y, final = gate_loop(*args, backend=backend)
    grads = torch.ones_like(y), torch.ones_like(final)
    torch.autograd.backward((y, final), grads)
    with torch.no_grad():
        y.zero_(), final.zero_()
    assert all(torch.equal(x, old) for x, old in zip(args, before, strict=True))
    assert all((x == 1).all() for x in grads)


@pytest.mark.parametrize(("backend", "kind"), [*product(["eager", "chunkwise"], KINDS), ("jax", "complex-head")])
def test_compiles_into_one_graph(backend: str, kind: str) -> None:
    args = make_loop(2, **KINDS[kind])

    def function(q: Tensor, k: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Any:
        y, final = gate_loop(q * 2, k, v, a.conj(), s, backend=backend)
        return y.sin(), final

    one_graph = compiled(function)
    assert_equal(*(values_and_gradients(f, args) for f in (one_graph, function)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_with_inductor() -> None:
    q, k, v, a, s = make_loop()
    args = q, k, v, a.real.clone(), a.imag.clone(), s.real.clone(), s.imag.clone()

    def function(q: Tensor, k: Tensor, v: Tensor, re: Tensor, im: Tensor, x: Tensor, y: Tensor) -> Any:
        return gate_loop(q * 2, k, v, (re, im), (x, y))

    one_graph = compiled(function, "inductor")
    assert_equal(*(values_and_gradients(f, args) for f in (one_graph, function)))


MEMORY = """
import resource, torch
from gateloop_transformer.ops import gate_loop
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def loop(T):
    q, k, v = (torch.randn(1, T, 8, 64, requires_grad=True) for _ in range(3))
    a = torch.polar(torch.rand(1, T, 8), torch.randn(1, T, 8)).requires_grad_()
    before = peak()
    gate_loop(q, k, v, a)[0].sum().backward()
    return peak() - before
loop(64)
print(loop(4096), loop(8192), loop(16384))
"""


@pytest.mark.slow
def test_memory_grows_linearly_and_stays_under_two_gigabytes() -> None:
    first, second, third = (int(n) / 2**20 for n in processes.python("-c", MEMORY).split())
    assert first + second < 2
    # Each run reuses what the one before it freed; the peak may double with T, not quadruple.
    assert first + second + third < 4


def test_bad_input_is_named() -> None:
    q, k, v, a, s = make_loop(2, 7, 3, 4, 5)
    bad = {
        r"queries must have shape \(B, T, H, K\), not \(2, 7, 3\)": (q[..., 0], k, v, a, s),
        r"keys must have shape .* = \(2, 7, 3, 4\).* not \(2, 6, 3, 4\)": (q, k[:, 1:], v, a, s),
        r"values must have shape .* = \(2, 7, 3, 5\), not \(2, 7, 2, 5\)": (q, k, v[:, :, 1:], a, s),
        r"values must have shape \(B, T, H, V\), not \(2, 7, 3\)": (q, k, v[..., 0], a, s),
        r"gates must have shape .*\(2, 7, 3\) or .*\(2, 7, 3, 4\), not \(2, 7, 3, 5\)": (q, k, v, v, s),
        r"initial must have shape .* = \(2, 3, 4, 5\), not \(3, 4, 5\)": (q, k, v, a, s[0]),
        r"queries must be a floating-point tensor, not torch.int64": (q.long(), k, v, a, s),
        r"gates must be a floating-point tensor, not torch.bool": (q, k, v, a.real > 0, s),
        r"values must be real, not torch.complex128": (q, k, v.to(torch.complex128), a, s),
        r"must have one dtype, not torch.float64, torch.float32, torch.float64": (q, k.float(), v, a, s),
        r"one device.*'keys': 'meta'": (q, k.to("meta"), v, a, s),
        r"one device.*'initial': 'meta'": (q, k, v, a, s.to("meta")),
        r"queries must be a torch tensor, not ndarray": (q.numpy(), k, v, a, s),
        r"values must be a torch tensor, not NoneType": (q, k, None, a, s),
        r"both be tensors or both be tuples": (q, k, v, (a.real, a.imag), s.real),
        r"gates.* one shape": (q, k, v, (a.real, k), None),
        r"gates must be real, not torch.complex128": (q, k, v, (a, a), None),
        r"gates.1. must be a floating-point tensor, not torch.int64": (
            q,
            k,
            v,
            (a.real, a.real.long()),
            None,
        ),
        r"one device.*'gates.1.': 'meta'": (q, k, v, (a.real, a.imag.to("meta")), None),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"gate_loop: .*{message}"):
            gate_loop(*arguments)


# The others with `make slow`: what is narrowed does not depend on the gates.
AUTOCAST = ["complex-head", "real-channel"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in AUTOCAST else pytest.mark.slow) for kind in KINDS]
)
def test_autocast_narrows_nothing_inside(backend: str, kind: str) -> None:
    args = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in make_loop(T=40, **KINDS[kind])]
    expected = values_and_gradients(run(backend), args)
    with torch.autocast("cpu", torch.bfloat16):
        results = values_and_gradients(run(backend), args)
    assert_equal(results, expected, 0)
