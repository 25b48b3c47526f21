"""The processes of a run: how many there are, which part each has, and how they agree.

A launcher starts them and says in the environment who they are, as torchrun does; torch.distributed does the rest.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from gateloop_transformer.arguments import check_release
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.runs.folder import pick_device

Value = TypeVar("Value")

# A process waits for another at most this long: one that was stopped, or whose machine is gone without a word.
TIMEOUT = timedelta(minutes=10)
FAILURES = (ValueError, OSError, RuntimeError, MemoryError, OverflowError)


class ElsewhereError(SystemExit):
    """Another process failed and says why; this one ends with the same exit code, silently."""


class LostError(RuntimeError):
    """Another process is gone."""


def launched() -> int:
    """How many processes a launcher (torchrun, accelerate launch, ...) has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def _check_launcher(options: TrainingConfig) -> None:
    """Refuse what `accelerate launch` was asked for and this run would do otherwise.

    Raises:
        ValueError: there is such a thing.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", {"float32": "no", "bf16": "bf16", "float64": "no"}[options.precision]):
        raise ValueError(
            f"accelerate launch asks for the precision {precision}, gateloop train for {options.precision}: give "
            "--precision bf16 to both or to none"
        )
    micro = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    if micro not in (1, options.accumulate):
        raise ValueError(f"accelerate launch accumulates {micro} gradients, gateloop train {options.accumulate}")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and options.parallel != "fsdp":
        raise ValueError("accelerate launch asks for FSDP: give gateloop train --parallel fsdp too")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError("accelerate launch asks for torch.compile, which gateloop train has no use for")
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"accelerate launch asks for {name.lower().replace('_', ' ')}, which gateloop train has no use for: it "
                "takes --parallel ddp or fsdp, and --context-parallel N"
            )


def _device(name: str) -> torch.device:
    """The device of this process: the one of that name, or its own of that kind where there are several processes.

    Raises:
        ValueError: this machine has no such device, or too few for all processes, or the launcher asks for CPUs.
    """
    device = pick_device(name)
    if device.type != "cpu" and os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise ValueError("accelerate launch asks for CPUs: give gateloop train --device cpu too")
    if launched() == 1:
        return device
    own = torch.accelerator.current_accelerator()
    if device.index is not None or device.type not in ("cpu", own and own.type):
        raise ValueError(f"{launched()} processes cannot share the device {name!r}: leave out --device, or give cpu")
    if device.type == "cpu":
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if here > there:
        raise ValueError(
            f"{here} processes of this machine cannot share {there} of its devices ({device.type}): start fewer, or "
            "give --device cpu"
        )
    torch.accelerator.set_device_index(local)
    return torch.device(device.type, local)


# Numbers the runs of this process.
_runs = itertools.count()


def _meet(device: torch.device) -> None:
    """Find the other processes, and wait for them.

    Each run of a process has addresses of its own: those that others have left for an earlier one are not read.
    """
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    apart = PrefixStore(f"run-{next(_runs)}", store)
    backend = dist.Backend.default_device_backend_map[device.type]
    dist.init_process_group(backend, store=apart, rank=rank, world_size=size, timeout=TIMEOUT)


class Engine:
    """The processes of a run. One of them, `main`, writes files and speaks.

    rank, size: of this process, of all. data_rank, data_size: batches are shared out among so many. context_size:
    processes that share each sequence; context_group: them, None where there is but this one.
    """

    def __init__(self, options: TrainingConfig) -> None:
        """Find the other processes, and wait for them.

        Raises:
            ValueError: the launcher's wishes contradict the configuration, or the processes cannot be shared out.
        """
        _check_launcher(options)
        self.device = _device(options.device)
        self.rank, self.size = 0, launched()
        if self.size > 1:
            _meet(self.device)
            self.rank = dist.get_rank()
        self.main = self.rank == 0
        self.context_size = options.context_parallel
        self.data_rank, self.context_rank = divmod(self.rank, self.context_size)
        self.data_size = self.size // self.context_size
        self.context_group: dist.ProcessGroup | None = None
        self.fsdp = options.parallel == "fsdp" and self.size > 1
        self.last_exchange = 0.0

    def check(self, options: TrainingConfig) -> None:
        """The work can be shared out.

        Raises:
            ValueError: it cannot.
        """
        if self.fsdp and self.device.type == "cpu":
            check_release("--parallel fsdp on CPUs", "torch", torch.__version__, "2.7")
        what = f"{self.size} {'process' if self.size == 1 else 'processes'}"
        if self.size % self.context_size:
            raise ValueError(
                f"{what} cannot share windows in groups of {self.context_size}: give another --context-parallel "
                "(1 for none)"
            )
        if options.windows < self.data_size:
            raise ValueError(
                f"a step of {options.windows} windows (--batch times --accumulate) cannot be shared by {what}: "
                "each needs one at least"
            )
        if options.context < self.context_size:
            raise ValueError(f"a context of {options.context} cannot be shared by {self.context_size} processes")

    def make_groups(self) -> None:
        """The processes that share a sequence find each other. All processes call this."""
        if self.context_size == 1:
            return
        for first in range(0, self.size, self.context_size):
            group = dist.new_group(list(range(first, first + self.context_size)), timeout=TIMEOUT)
            if first <= self.rank < first + self.context_size:
                self.context_group = group

    def described(self) -> str:
        """In words: "cpu", or "4 x cpu (fsdp, 2 share each window)"."""
        if self.size == 1:
            return str(self.device)
        how = "fsdp" if self.fsdp else "ddp"
        shared = f", {self.context_size} share each window" if self.context_size > 1 else ""
        return f"{self.size} x {self.device.type} ({how}{shared})"

    def close(self) -> None:
        """Let go of the other processes."""
        self.context_group = None
        if self.size > 1:
            # Where something still refers to a process group at exit, its threads end the process with an abort.
            gc.collect()
            dist.destroy_process_group()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        # Whoever has lost another process would wait for it here.
        if not isinstance(error, LostError):
            self.close()

    def rows(self, windows: int) -> slice:
        """Which of a step's windows this process has."""
        return slice(windows * self.data_rank // self.data_size, windows * (self.data_rank + 1) // self.data_size)

    def micro_batches(self, options: TrainingConfig) -> list[slice]:
        """The same cut into micro-batches of --batch windows at most; as many on all processes."""
        own = self.rows(options.windows)
        count = math.ceil(math.ceil(options.windows / self.data_size) / options.batch)
        cuts = [own.start + (own.stop - own.start) * n // count for n in range(count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]

    def part(self, length: int) -> slice:
        """The steps of a sequence that this process has."""
        rank, size = self.context_rank, self.context_size
        return slice(length * rank // size, length * (rank + 1) // size)

    def shard(self, model: nn.Module) -> None:
        """With FSDP2, spread the parameters over all processes, in place: one unit a block, and one for the rest."""
        if not self.fsdp:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in model.layers:  # type: ignore[union-attr]
            fully_shard(list(block), mesh=mesh)
        fully_shard(model, mesh=mesh)

    def reshard(self, model: nn.Module) -> None:
        """With FSDP2, let go of weights that a forward pass without a backward pass has gathered."""
        if self.fsdp:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def wrap(self, model: nn.Module, unused: bool) -> nn.Module:
        """What to call in the model's place, so that gradients become means over all processes.

        Args:
            model: as `shard` left it.
            unused: some parameters may have no gradient.
        """
        if self.size == 1 or self.fsdp:
            return model
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused, gradient_as_bucket_view=True)
        # A lambda, as torch looks at annotations, and takes them for something else where they are texts.
        hook = lambda _state, bucket: self._exchange(bucket)  # noqa: E731
        wrapped.register_comm_hook(None, hook)
        return wrapped

    def _exchange(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """DDP's own exchange, which notes when the last one began: what follows is waiting."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.last_exchange = time.perf_counter()
        return allreduce_hook(dist.distributed_c10d._get_default_group(), bucket)

    def accumulating(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a backward pass: with DDP gradients are exchanged after the last micro-batch only.

        With FSDP2 after each: whole gradients would have to be kept between them, which is what it is to avoid.
        """
        if self.size == 1 or self.fsdp:
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else model.no_sync()  # type: ignore[operator]

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return values
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=kind, device=self.device)
        with self.watched():
            dist.all_reduce(total)
            return total.tolist()

    def share(self, values: list[Any]) -> list[Any]:
        """The main process's values, on all."""
        if self.size > 1:
            with self.watched():
                dist.broadcast_object_list(values, src=0, device=self.device)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of the processes, on all."""
        values = [value] * self.size
        if self.size > 1:
            with self.watched():
                dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], Value], main: bool = False) -> Value | None:
        """Run a function on all processes (or on the main one alone); where it fails on one, all fail.

        Returns:
            What the function returned; None where it was not run.

        Raises:
            ElsewhereError: it failed on another process, which says so.
            Exception: what the function raised; on the main process also what it raised elsewhere, as far as said.
        """
        if self.size == 1:
            return function()
        value, failure = None, None
        try:
            if self.main or not main:
                value = function()
        except FAILURES as error:
            failure = error
        codes = self.gather(None if failure is None else (2 if isinstance(failure, ValueError) else 1, str(failure)))
        failed = [n for n, code in enumerate(codes) if code is not None]
        if not failed:
            return value
        code, text = codes[failed[0]]
        if not self.main:
            raise ElsewhereError(code)
        if failure is not None:
            raise failure
        raise (ValueError if code == 2 else RuntimeError)(f"process {failed[0]}: {text}")

    def fail(self, error: Exception) -> NoReturn:
        """End all processes with an error that all of them have; the main one says it."""
        if not self.main:
            raise ElsewhereError(2 if isinstance(error, ValueError) else 1)
        raise error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Say that a process is gone where torch says something of sockets.

        Raises:
            LostError: one is gone, or did not answer for `TIMEOUT`.
        """
        try:
            yield
        except LostError:
            raise
        except RuntimeError as error:
            if self.size > 1 and _is_lost(error):
                reason = str(error).splitlines()[0].split("] ")[-1].split(". ")[0]
                raise LostError(
                    f"process {self.rank} lost contact with the others: one was killed, or its machine is "
                    f"gone ({reason})"
                ) from error
            raise

    def gather_rows(self, rows: Tensor, windows: int) -> Tensor:
        """What belongs to the windows of a step (windows, ...), in order, from the rows of this process."""
        if self.data_size == 1:
            return rows
        most = -(-windows // self.data_size)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        shares = [windows * (n + 1) // self.data_size - windows * n // self.data_size for n in range(self.data_size)]
        return torch.cat([parts[n * self.context_size][:share] for n, share in enumerate(shares)])


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another process does not answer."""
    text = str(error).lower()
    signs = (
        "connection closed",
        "connection reset",
        "connection refused",
        "broken pipe",
        "timed out",
        "timeout",
        "gloo",
    )
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes. All of them call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `full`: this process's part of a whole tensor, spread as `like` is; on its device, of its type."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = whole.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)
