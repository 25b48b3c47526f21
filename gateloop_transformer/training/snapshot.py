"""What a checkpoint holds, collected from the processes of a run and given back to however many there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gateloop_transformer.layers.state import TransformerState
from gateloop_transformer.runs.checkpoint import Progress, Snapshot
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.stored import DamageError
from gateloop_transformer.training.engine import Engine, full, own
from gateloop_transformer.training.optimizer import Average

_KINDS = ("exp_avg", "exp_avg_sq", "step")


def take(
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    carried: list[TransformerState | None],
    windows: int,
    progress: Progress,
) -> Snapshot | None:
    """Collect a snapshot on the main process. All processes call this; the others get None."""
    weights = _collect(engine, model.state_dict())
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}|{kind}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }
    optimized = _collect(engine, moments)
    averaged = {} if average is None else _collect(engine, average.weights)
    states = [state for state in carried if state is not None]
    whole = _joined(states).map(lambda rows: engine.gather_rows(rows, windows).cpu()) if states else None
    return Snapshot(progress, weights, optimized, averaged, whole) if engine.main else None


def _joined(states: list[TransformerState]) -> TransformerState:
    """The rows of all states, one after the other."""
    tensors: list[list[Tensor]] = []
    for state in states:
        tensors.append([])
        state.map(lambda tensor, found=tensors[-1]: found.append(tensor) or tensor)  # type: ignore[misc]
    columns = zip(*tensors, strict=True)
    return states[0].map(lambda _: torch.cat(next(columns)))


def _collect(engine: Engine, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the main process; nothing on the others."""
    whole = {}
    for name, tensor in tensors.items():
        value = full(tensor.detach())
        if engine.main:
            whole[name] = value.cpu()
    return whole


def give(
    engine: Engine,
    snapshot: Snapshot,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    options: TrainingConfig,
) -> list[TransformerState | None]:
    """Put a snapshot's tensors where they belong on this process.

    Returns:
        The carried states, one for each micro-batch of this process.

    Raises:
        ValueError: names or shapes are not the model's.
    """
    _fill(dict(model.state_dict()), snapshot.model, "the model's weights")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {f"{name}|{kind}": parameters[name].shape for name in parameters for kind in _KINDS}
    shapes |= {f"{name}|step": torch.Size([]) for name in parameters}
    if {key: value.shape for key, value in snapshot.optimizer.items()} != shapes:
        raise DamageError("the checkpoint's optimizer state is not that of its model")
    for name, parameter in parameters.items():
        state = {kind: own(snapshot.optimizer[f"{name}|{kind}"], parameter.detach()) for kind in _KINDS[:2]}
        optimizer.state[parameter] = {**state, "step": snapshot.optimizer[f"{name}|step"].to(parameter.device)}
    if average is not None:
        _fill(average.weights, snapshot.average, "the average of the weights")
    if snapshot.carried is None:
        return []
    rows = torch.arange(options.windows)
    return [snapshot.carried.select(rows[own]).to(engine.device) for own in engine.micro_batches(options)]


@torch.no_grad()
def _fill(targets: dict[str, Tensor], sources: dict[str, Tensor], what: str) -> None:
    if {name: tensor.shape for name, tensor in targets.items()} != {n: tensor.shape for n, tensor in sources.items()}:
        raise DamageError(f"{what} in the checkpoint have other names or shapes than the model's")
    for name, target in targets.items():
        target.copy_(own(sources[name], target.detach()))
