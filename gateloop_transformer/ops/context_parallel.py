"""One sequence over the ranks of a process group, each holding a stretch of its time: who they are, how they talk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = TypeVar("Function", bound=Callable[..., Any])

# As long a description as is compared between ranks.
_WORDS = 256

_current: ContextVar[Ranks | None] = ContextVar("gateloop_context_parallel", default=None)
# How many blocks are open, in all threads. Where none is, operators read this number and nothing else.
_open = 0
_lock = threading.Lock()


@contextlib.contextmanager
def context_parallel(group: Any) -> Iterator[None]:
    """Operators, layers and models called in this block compute over sequences that are split over `group`.

    Every rank holds a contiguous part of time of the same sequences, the first rank the first part; parts may have
    different lengths, 0 included. What a rank gets is what it would get of the whole sequence for its part: outputs,
    and the gradients of all that it holds. Every rank makes the same calls in the same order, and the same backward
    passes, which may run after the block.

    - The loss of the whole is the sum of the ranks' losses; the gradient of a parameter, or of any tensor that all
      ranks have a copy of, is the sum of the ranks' gradients.
    - `initial` and `state` are what precedes the whole sequence. All ranks give one or none does; that of the rank
      that comes first counts (with reverse=True the last rank), its gradient is there, and zeros elsewhere.
    - Final states are those of the whole sequence, the same on all ranks, differentiable on all.
    - `resets` are those of the own part. `cu_seqlens` and `mask` are refused.
    - Dropout is drawn by each rank on its own.

    What a gate loop or a scan sends does not depend on T: for B rows, H heads and K × V states, forwards
    B·H·(g + K·V) numbers per rank and backwards 2·B·H·K·V, g being 1 or, with a gate per key channel, K; complex ones
    count twice. At head size 1, that is with D channels, 4·B·D both ways for complex gates (2·B·D for real ones). A
    convolution sends B·(taps-1)·D numbers each way, and a few marks. Attention layers gather all keys and values,
    2·B·T·D numbers each way: they alone grow with T.

    The first exchange in a block compares what the ranks are about to compute. A rank that fails elsewhere leaves the
    others waiting until the group's timeout. A compiled graph breaks at such operators; `fullgraph=True` is an
    error. Activation checkpointing runs the forward pass again outside of the block: give it
    `context_fn=lambda: (contextlib.nullcontext(), context_parallel(group))`.

    Args:
        group: a process group of torch.distributed with this process in it. None, or a group of one: every rank on
            its own, as without the block; inside another block that is suspended.

    Raises:
        ValueError: not a process group, or one without this process.

    Example, on rank r of n of them, started by torchrun::

        torch.distributed.init_process_group("gloo")
        part = T // n
        with context_parallel(torch.distributed.group.WORLD):
            y = layer(x[:, r * part : (r + 1) * part])
            y.square().sum().backward()
        for parameter in layer.parameters():
            torch.distributed.all_reduce(parameter.grad)
    """
    global _open
    token = _current.set(_ranks(group))
    with _lock:
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
        _current.reset(token)


def current() -> Ranks | None:
    """The ranks that sequences are split over here; None: a sequence is whole."""
    return _current.get() if _open else None


def refuse(what: str, instead: str) -> None:
    """Nothing, outside of `context_parallel`.

    Raises:
        NotImplementedError: inside of it.
    """
    if current() is not None:
        raise NotImplementedError(f"{what} does not run over the ranks of context_parallel; {instead}")


def _ranks(group: Any) -> Ranks | None:
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "context_parallel: group must be a process group of torch.distributed that this process is in, or None, "
            f"not {group!r}"
        )
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return None if size == 1 else Ranks(group, size, rank)


def uncompiled(function: Function) -> Function:
    """`function`, at which a compiled graph breaks: compilers do not see what ranks say to each other."""

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        # Not at import: it takes longer than all else that is imported here.
        return torch.compiler.disable(function)(*arguments, **options)

    return called  # type: ignore[return-value]


@dataclasses.dataclass
class Ranks:
    """The ranks that hold parts of the same sequences.

    size: how many; place: which of them this one is, counted in the direction of the scan.
    """

    group: Any
    size: int
    place: int
    backwards: bool = False
    compared: list[str] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether the sequence begins here."""
        return self.place == 0

    def along(self, reverse: bool) -> Ranks:
        """The same ranks, counted from the last if `reverse`."""
        return dataclasses.replace(self, place=self.size - 1 - self.place, backwards=True) if reverse else self

    @uncompiled
    def compare(self, what: str, device: torch.device) -> None:
        """All ranks say the same of what they are about to compute; asked once in a block.

        Raises:
            ValueError: they do not.
        """
        if self.compared:
            return
        self.compared.append(what)
        words = torch.tensor(list(what.encode()[:_WORDS].ljust(_WORDS)), dtype=torch.uint8, device=device)
        said = [bytes(row).decode().rstrip() for row in self.gather(words).tolist()]
        if len(set(said)) > 1:
            listed = "; ".join(f"rank {n}: {text}" for n, text in enumerate(said))
            raise ValueError(f"context_parallel: the ranks do not compute the same: {listed}")

    @uncompiled
    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, of one shape and dtype, in the order of places (size, ...); no gradient."""
        x = x.detach().contiguous()
        whole = x.new_empty(self.size, *x.shape)
        if x.numel():
            # Bytes: not every library knows every dtype.
            dist.all_gather_single(whole.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8), group=self.group)
        return whole.flip(0) if self.backwards else whole

    @uncompiled
    def gather_with_gradient(self, x: Tensor) -> Tensor:
        """`gather`; the gradient of x is the sum of those that all ranks have for it."""
        gathered: Tensor = _Gather.apply(self, x)  # type: ignore[no-untyped-call]
        return gathered

    def scatter_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of what each has for this one, of x (size, ...)."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = (x.flip(0) if self.backwards else x).to(wide).contiguous()
        own = torch.empty_like(x[0])
        if x.numel():
            dist.reduce_scatter_single(own.view(-1), x.view(-1), group=self.group)
        return own


def nothing(x: Tensor) -> Tensor:
    """Zeros in the graph of x, whose gradient they are: a backward pass must reach the same exchanges on all ranks."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks, ctx.dtype = ranks, x.dtype
        return ranks.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.ranks.scatter_sum(grad).to(ctx.dtype)
