"""What the operators accept, said in one error when it is not met."""

from __future__ import annotations

import torch
from torch import Tensor

from gateloop_transformer.ops.pairs import Pair


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
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{operator}: all tensors must be on one device, not {devices}")


def fit(gradient: Pair, argument: list[Tensor]) -> list[Tensor]:
    """A gradient in the form of its argument: as many parts, their dtype; nothing aliased.

    The imaginary part of a real argument's gradient is dropped, a missing one is zero.
    """
    parts = (gradient.as_complex() if len(argument) == 2 else gradient).parts()
    return [part.to(like.dtype).contiguous() for part, like in zip(parts, argument, strict=False)]


def no_gradient(*tensors: Tensor) -> list[Tensor]:
    """Zeros in the shapes of `tensors`: the gradient of an empty computation, and what fakes return."""
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
