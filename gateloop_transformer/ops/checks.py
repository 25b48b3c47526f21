"""What the operators accept, said in one error when it is not met."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import Layout, read_layout
from gateloop_transformer.ops.pairs import Pair, without_autocast


def tensors(operator: str, **arguments: object) -> None:
    """All arguments are torch tensors.

    Raises:
        ValueError: one is not.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{operator}: {name} must be a torch tensor, not {type(value).__name__}")


def dims(operator: str, name: str, tensor: Tensor, names: str) -> None:
    """`tensor` has as many dimensions as `names` has words.

    Raises:
        ValueError: it has not.
    """
    expected = names.split()
    if tensor.ndim != len(expected):
        raise ValueError(f"{operator}: {name} must have shape ({', '.join(expected)}), not {tuple(tensor.shape)}")


def same_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """`tensor` has the shape that the other arguments demand.

    Raises:
        ValueError: it has not.
    """
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{operator}: {name} must have shape {meaning} = {tuple(expected)}, not {tuple(tensor.shape)}")


def floating(operator: str, real_only: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """All tensors are floating point; complex ones only where not named in `real_only`.

    Raises:
        ValueError: one is not.
    """
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_floating_point():
            continue
        if not tensor.is_complex():
            raise ValueError(f"{operator}: {name} must be a floating-point tensor, not {tensor.dtype}")
        if name in real_only:
            raise ValueError(f"{operator}: {name} must be real, not {tensor.dtype}; only gates and states are complex")


def same_device(operator: str, **tensors: Tensor | None) -> None:
    """All tensors are on one device.

    Raises:
        ValueError: they are not.
    """
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
        raise ValueError(f"{operator}: all tensors must be on one device, not {devices}")


def scan(
    operator: str,
    gates: Tensor,
    inputs: Tensor,
    initial: Tensor | None,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout:
    """Shapes, dtypes and devices of an elementwise recurrence, and how its batch is laid out.

    Raises:
        ValueError: they do not fit.
    """
    tensors(operator, gates=gates, inputs=inputs, **({} if initial is None else {"initial": initial}))
    dims(operator, "inputs", inputs, "B T D")
    same_shape(operator, "gates", gates, tuple(inputs.shape), "(B, T, D), that of inputs,")
    layout = read_layout(operator, inputs, resets, cu_seqlens)
    if initial is not None:
        states = layout.states(inputs.shape[0])
        same_shape(operator, "initial", initial, (states, inputs.shape[2]), f"({layout.letter()}, D)")
    floating(operator, gates=gates, inputs=inputs, initial=initial)
    same_device(operator, inputs=inputs, gates=gates, initial=initial)
    return layout


def gate_loop(
    operator: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Pair,
    initial: Pair | None,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout:
    """Shapes, dtypes and devices of a gate loop's arguments.

    Raises:
        ValueError: they do not fit.
    """
    tensors(operator, queries=queries, keys=keys, values=values)
    dims(operator, "queries", queries, "B T H K")
    B, T, H, K = queries.shape
    same_shape(operator, "keys", keys, (B, T, H, K), "(B, T, H, K), that of queries,")
    dims(operator, "values", values, "B T H V")
    same_shape(operator, "values", values, (B, T, H, values.shape[-1]), "(B, T, H, V)")
    for part in gates.parts():
        if tuple(part.shape) not in ((B, T, H), (B, T, H, K)):
            raise ValueError(
                f"{operator}: gates must have shape (B, T, H) = {(B, T, H)} or (B, T, H, K) = {(B, T, H, K)}, "
                f"not {tuple(part.shape)}"
            )
    if gates.im is not None and gates.im.shape != gates.re.shape:
        raise ValueError(f"{operator}: the gates' real and imaginary parts must have one shape")
    layout = read_layout(operator, queries, resets, cu_seqlens)
    for part in [] if initial is None else initial.parts():
        shape = (layout.states(B), H, K, values.shape[-1])
        same_shape(operator, "initial", part, shape, f"({layout.letter()}, H, K, V)")
    named: dict[str, Tensor | None] = {"queries": queries, "keys": keys, "values": values}
    named.update({"gates": gates.re, "gates[1]": gates.im})
    if initial is not None:
        named.update({"initial": initial.re, "initial[1]": initial.im})
    floating(operator, tuple(named), **named)
    same_device(operator, **named)
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"{operator}: queries, keys and values must have one dtype, "
            f"not {queries.dtype}, {keys.dtype}, {values.dtype}"
        )
    return layout


Body = TypeVar("Body", bound=Callable[..., Any])


def full_precision(body: Body) -> Body:
    """The body of a custom operator with autocast off: inside, torch would narrow its matrix products."""

    @functools.wraps(body)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        with without_autocast(first):
            return body(*arguments, **options)

    return wrapped  # type: ignore[return-value]


def fit(gradient: Pair, argument: list[Tensor]) -> list[Tensor]:
    """A gradient in the form of its argument: as many parts, their dtype; nothing aliased.

    The imaginary part of a real argument's gradient is dropped, a missing one is zero.
    """
    parts = (gradient.as_complex() if len(argument) == 2 else gradient).parts()
    return [part.to(like.dtype).contiguous() for part, like in zip(parts, argument, strict=False)]


def no_gradient(*tensors: Tensor) -> list[Tensor]:
    """Zeros in the shapes of `tensors`: the gradient of an empty computation, and what fakes return."""
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
