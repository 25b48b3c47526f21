"""Custom operators of torch, each made of a record and a few functions, with a way past torch's dispatcher.

A record is a named tuple of tensors, pairs, constants and a layout: what an operator computes from. From its fields
follow the operator's types, its fakes, what the backward pass is given, and the form of every gradient.

Compilers, tracers and modes see an operator by its name. Where none of them is at work the same functions are called
directly: the way through the dispatcher takes longer than a decoding step of a layer. Transformations (`torch.func`),
second derivatives and forward mode see plain torch operators in its place, which compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from gateloop_transformer.ops.checks import fit
from gateloop_transformer.ops.dispatch import unwatched
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair, without_autocast

# What torch calls the types of a record's fields.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor {}",
    Tensor | None: "Tensor? {}",
    Pair: "Tensor[] {}",
    Pair | None: "Tensor[] {}",
    Layout: "Tensor? resets, Tensor? cu_seqlens",
    bool: "bool {}",
    float: "float {}",
    str: "str {}",
    torch.dtype: "ScalarType {}",
}

# How a field crosses the boundary: as it is, as a list of one or two tensors, as two arguments.
_ONE, _PAIR, _LAYOUT = range(3)

Record = TypeVar("Record", bound=tuple[Any, ...])
# The gradient of a field: in its form, in any precision; None: zero, or the field is no tensor.
Gradient = Tensor | Pair | None


# All of them by name.
OPERATORS: dict[str, Operator[Any]] = {}


class Operator(Generic[Record]):
    """`gateloop::name`, of a record.

    Args:
        name: what torch knows it by.
        record: the class of records.
        results: empty tensors in the shapes and dtypes of the results.
        forward: the results; none of them shares memory with another or with the record.
        backward: of the record, what `saved` keeps, and the gradients of the results: a gradient for each of the first
            fields of the record; those left out hold no tensors, or a layout.
        plain: the results, of differentiable operators of torch alone.
        saved: which of the results the backward pass is given.
        hidden: how many results, the last ones, are for the backward pass alone: they have no gradient.
        rows: whether all tensors of a record, results and what is saved have the batch as their first dimension.
    """

    def __init__(
        self,
        name: str,
        record: type[Record],
        *,
        results: Callable[[Record], list[Tensor]],
        forward: Callable[[Record], list[Tensor]],
        backward: Callable[[Record, list[Tensor], list[Tensor]], Sequence[Gradient]],
        plain: Callable[[Record], list[Tensor]],
        saved: slice = slice(0),
        hidden: int = 0,
        rows: Callable[[Record], bool] = lambda record: False,
    ) -> None:
        self.name, self.record, self.plain = name, record, plain
        self._results, self.saved, self.hidden, self._rows = results, saved, hidden, rows
        self._compute, self._differentiate = forward, backward
        hints = get_type_hints(record)
        kinds = {field: hints[field] for field in record._fields}  # type: ignore[attr-defined]
        fields = ", ".join(_TYPES[kind].format(field) for field, kind in kinds.items())
        self._forms = [_form(kind) for kind in kinds.values()]
        self.registered = self._register(name, f"({fields}) -> Tensor[]", self._body, self._fake)
        self.registered_backward = self._register(
            f"{name}_backward",
            f"(Tensor[] grad, Tensor[] kept, {fields}) -> Tensor[]",
            self._backward_body,
            self._backward_fake,
        )
        self.registered.register_autograd(self._gradient, setup_context=self._setup)
        self.registered.register_vmap(_folded(lambda *arguments: self(self.unpacked(arguments))))
        self.registered_backward.register_vmap(_folded(self.registered_backward))
        self._function = type(name, (_Direct,), {"operator": self})
        OPERATORS[name] = self

    def __call__(self, record: Record) -> list[Tensor]:
        """The results, differentiable any number of times, in both modes, and under the transformations of torch.func.

        Under a compiler they are differentiable once.
        """
        if torch.compiler.is_compiling():
            return self._dispatched(record)
        tensors = list(self._tensors(record))
        if unwatched(*tensors) and forward_ad._current_level < 0:
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                return list(self._function.apply(record, *tensors))  # type: ignore[attr-defined]
            return self.forward(record)
        if self._to_be_plain(record, tensors):
            return self.plain(record)
        return self._dispatched(record)

    def _dispatched(self, record: Record) -> list[Tensor]:
        results: list[Tensor] = self.registered(*self.packed(record))
        return results

    def forward(self, record: Record) -> list[Tensor]:
        """The results as numbers."""
        with without_autocast(record[0] if isinstance(record[0], Tensor) else record[0][0]):
            return self._compute(record)

    def backward(self, record: Record, kept: list[Tensor], grad: list[Tensor]) -> list[Tensor]:
        """The gradients of all tensors of the record in turn, as numbers; there is none of a layout."""
        with without_autocast(grad[0]):
            gradients = self._differentiate(record, kept, grad)
        fitted: list[Tensor] = []
        for gradient, value in zip(gradients, record, strict=False):
            like = list(_tensors_of(value))
            if gradient is None:
                fitted += _zeros(like)
            elif like:
                fitted += fit(gradient if isinstance(gradient, Pair) else Pair(gradient), like)
        return fitted

    def packed(self, record: Record) -> list[Any]:
        """A record as the arguments of the registered operator."""
        arguments: list[Any] = []
        for form, value in zip(self._forms, record, strict=True):
            if form == _LAYOUT:
                arguments += value
            elif form == _PAIR:
                arguments.append([] if value is None else value.parts())
            else:
                arguments.append(value)
        return arguments

    def unpacked(self, arguments: Sequence[Any]) -> Record:
        """The record whose `packed` this is."""
        rest = iter(arguments)
        values: list[Any] = []
        for form in self._forms:
            value = next(rest)
            if form == _LAYOUT:
                value = Layout(value, next(rest))
            elif form == _PAIR:
                value = Pair(*value) if value else None
            values.append(value)
        return self.record(*values)

    def _register(self, name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"gateloop::{name}", body, mutates_args=(), schema=schema)
        registered.register_fake(fake)
        return registered

    def _body(self, *arguments: Any) -> list[Tensor]:
        return self.forward(self.unpacked(arguments))

    def _fake(self, *arguments: Any) -> list[Tensor]:
        return self._results(self.unpacked(arguments))

    def _backward_body(self, grad: list[Tensor], kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        return self.backward(self.unpacked(arguments), list(kept), list(grad))

    def _backward_fake(self, grad: list[Tensor], kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        return _zeros(self.slopes(self.unpacked(arguments)))

    def _tensors(self, record: Iterable[Any]) -> Iterator[Tensor]:
        for value in record:
            yield from _tensors_of(value)

    def slopes(self, record: Iterable[Any]) -> Iterator[Tensor]:
        """Those that have gradients."""
        return self._tensors(value for value in record if not isinstance(value, Layout))

    def _with(self, record: Record, tensors: Sequence[Tensor]) -> Record:
        """The record with other tensors in the place of its own."""
        rest = iter(tensors)
        return self.record(*(_replaced(value, rest) for value in record))

    def _to_be_plain(self, record: Record, tensors: Sequence[Tensor]) -> bool:
        """Whether torch must see plain operators: for a tangent, or for a transformation."""
        top = torch._C._functorch.peek_interpreter_stack()
        if top is not None and top.key() in (TransformType.Grad, TransformType.Jvp):
            return True
        if top is not None and top.key() == TransformType.Vmap:
            return not self._rows(record)
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        self.remember(ctx, self.unpacked(inputs), output)

    def _gradient(self, ctx: Any, grad: Sequence[Tensor | None]) -> tuple[Any, ...]:
        record, gradients = self.recall(ctx, grad)
        rest = iter(gradients)
        layout = Layout()
        slopes = (layout if isinstance(value, Layout) else _replaced(value, rest, None) for value in record)
        return tuple(self.packed(self.record(*slopes)))

    def remember(self, ctx: Any, record: Record, results: Sequence[Tensor]) -> None:
        """Save what the backward pass needs."""
        tensors = list(self._tensors(record))
        shown = results[: len(results) - self.hidden]
        ctx.mark_non_differentiable(*results[len(shown) :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *results[self.saved])
        ctx.likes = [(x.shape, x.dtype, x.device) for x in shown]
        ctx.count = len(tensors)
        # Tensors are saved by the context alone: it sees when one was changed since.
        ctx.form = self._with(record, [_NOTHING] * len(tensors))

    def recall(self, ctx: Any, grad: Sequence[Tensor | None]) -> tuple[Record, list[Tensor]]:
        """The record, and the gradients of its tensors."""
        saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.count], list(saved[ctx.count :])
        record = self._with(ctx.form, tensors)
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(grad, ctx.likes, strict=False)
        ]
        if torch.is_grad_enabled() or self._batched(record, given):
            return record, self._plain_gradient(record, given)
        if unwatched(*tensors, *given, *kept):
            return record, self.backward(record, kept, given)
        gradients: list[Tensor] = self.registered_backward(given, kept, *self.packed(record))
        return record, gradients

    def _batched(self, record: Record, grad: list[Tensor]) -> bool:
        """Whether many gradients come at once, in a way that no kernel can take."""
        top = torch._C._functorch.peek_interpreter_stack()
        if top is not None:
            return not (top.key() == TransformType.Vmap and self._rows(record) and not self.hidden)
        # `is_grads_batched` has a vmap of its own, which knows no rules of custom operators.
        return any(torch._C._functorch.is_legacy_batchedtensor(x) for x in grad)

    def _plain_gradient(self, record: Record, grad: list[Tensor]) -> list[Tensor]:
        """The gradients of all tensors, differentiable again, from the plain operators."""
        slopes, tensors = list(self.slopes(record)), list(self._tensors(record))

        def run(*changed: Tensor) -> tuple[Tensor, ...]:
            # What else there is belongs to the layout, which stands last.
            return tuple(self.plain(self._with(record, [*changed, *tensors[len(changed) :]]))[: len(grad)])

        pull: Any = torch.func.vjp(run, *slopes)[1]
        return list(pull(tuple(grad)))


# In the place of a tensor that is kept elsewhere.
_NOTHING: Any = torch.empty(0)


class _Direct(torch.autograd.Function):
    """Autograd's way past the dispatcher: the record, and its tensors once more, which autograd sees only so."""

    operator: Operator[Any]

    @classmethod
    def forward(cls, ctx: Any, record: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results."""
        results = cls.operator.forward(record)
        cls.operator.remember(ctx, record, results)
        return tuple(results)

    @classmethod
    def backward(cls, ctx: Any, *grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of every tensor."""
        _, gradients = cls.operator.recall(ctx, grad)
        return None, *gradients, *[None] * (ctx.count - len(gradients))


def _form(kind: Any) -> int:
    """That of a field, by its type."""
    return _LAYOUT if kind is Layout else _PAIR if _TYPES[kind].startswith("Tensor[]") else _ONE


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a field of a record."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Pair, Layout)):
        for part in value:
            if part is not None:
                yield part


def _replaced(value: Any, rest: Iterator[Any], other: Any = ...) -> Any:
    """A field with the next ones in the place of its tensors; `other`, if given, in the place of what is none."""
    if isinstance(value, Tensor):
        return next(rest)
    if isinstance(value, (Pair, Layout)):
        parts: list[Any] = [None if part is None else next(rest) for part in value]
        return type(value)(*parts)
    return value if other is ... else other


def _zeros(tensors: Any) -> list[Tensor]:
    return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _folded(operator: Callable[..., list[Tensor]]) -> Callable[..., Any]:
    """How `torch.vmap` runs an operator of packed arguments: its dimension becomes a part of the batch."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
        N = info.batch_size

        def fold(x: Any, dim: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [fold(*each) for each in zip(x, dim, strict=True)]
            if not isinstance(x, Tensor):
                return x
            wide = x.expand(N, *x.shape) if dim is None else x.movedim(dim, 0)
            return wide.flatten(0, 1)

        results = operator(*(fold(*each) for each in zip(arguments, in_dims, strict=True)))
        return [x.unflatten(0, (N, x.shape[0] // N)) for x in results], [0] * len(results)

    return rule
