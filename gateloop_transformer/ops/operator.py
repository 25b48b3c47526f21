"""Custom operators of torch, with a way past its dispatcher.

Compilers, tracers, transformations and modes see an operator by its name. Where none of them is at work the same
functions are called directly: the way through the dispatcher takes longer than a decoding step of a layer, and half a
millisecond or more of its training step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gateloop_transformer.ops.dispatch import unwatched

# What torch calls the types of arguments and results. It infers them too, but not in every release from these names.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    list[Tensor]: "Tensor[]",
    bool: "bool",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
}
# One argument that is no list.
_SINGLE = -1


class Operator:
    """`body` as `gateloop::name`.

    Args:
        name: what torch knows it by.
        body: tensors, lists of tensors and constants by position → a tensor, or a list of them, none of which shares
            memory with another or with an argument.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.name, self.body = name, body
        self.registered = torch.library.custom_op(f"gateloop::{name}", mutates_args=(), schema=_schema(body))(body)
        self.register_fake = self.registered.register_fake
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(
        self, gradient: Callable[..., Any], setup: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """As `torch.library.register_autograd`: `setup(ctx, inputs, output)`, and `gradient(ctx, gradients)`."""
        self.registered.register_autograd(gradient, setup_context=setup)
        parts = {"body": self.body, "setup": setup, "gradient": gradient}
        self._function = type(self.name, (_Direct,), parts)

    def __call__(self, *arguments: Any) -> Any:
        """What the body gives, differentiable if a gradient is registered.

        Raises:
            NotImplementedError: a tensor has a tangent (forward-mode differentiation).
        """
        if torch.compiler.is_compiling():
            return self.registered(*arguments)
        sizes, flat = _flatten(arguments)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            # Torch would drop the tangents.
            raise NotImplementedError(f"{self.name} has no forward-mode derivative, only gradients")
        if not unwatched(*tensors):
            return self.registered(*arguments)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self.body(*arguments)
        if self._function is None:
            # The dispatcher's answer to a second derivative.
            return self.registered(*arguments)
        result = self._function.apply(sizes, *flat)
        return list(result) if isinstance(result, tuple) else result


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: the function as an `Operator` of this name."""
    return lambda body: Operator(name, body)


class _Direct(torch.autograd.Function):
    """Lists, which autograd does not look into, come as their tensors, after the sizes of all arguments."""

    body: Callable[..., Any]
    setup: Callable[[Any, tuple[Any, ...], Any], None]
    gradient: Callable[..., Any]

    @classmethod
    def forward(cls, ctx: Any, sizes: Sequence[int], *flat: Any) -> Any:
        """The body's result, a list as a tuple."""
        arguments = _unflatten(sizes, flat)
        result = cls.body(*arguments)
        ctx.sizes, ctx.several = sizes, isinstance(result, list)
        cls.setup(ctx, arguments, result)
        return tuple(result) if ctx.several else result

    @classmethod
    def backward(cls, ctx: Any, *grad: Any) -> Any:
        """The gradient of every tensor, in the order of the arguments."""
        gradients = cls.gradient(ctx, list(grad) if ctx.several else grad[0])
        flat = (
            [gradient] if size == _SINGLE else gradient or [None] * size
            for size, gradient in zip(ctx.sizes, gradients, strict=True)
        )
        return None, *itertools.chain.from_iterable(flat)


def _schema(body: Callable[..., Any]) -> str:
    """The types of arguments and result in torch's words."""
    *arguments, (_, result) = get_type_hints(body).items()
    return f"({', '.join(f'{_TYPES[kind]} {name}' for name, kind in arguments)}) -> {_TYPES[result]}"


def _flatten(arguments: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """The sizes of lists among the arguments, and all arguments with lists taken apart."""
    sizes: list[int] = []
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, list | tuple):
            sizes.append(len(argument))
            flat += argument
        else:
            sizes.append(_SINGLE)
            flat.append(argument)
    return sizes, flat


def _unflatten(sizes: Sequence[int], flat: Sequence[Any]) -> tuple[Any, ...]:
    """The opposite."""
    rest = iter(flat)
    return tuple(next(rest) if size == _SINGLE else list(itertools.islice(rest, size)) for size in sizes)
