"""All tasks, by name."""

from __future__ import annotations

from gateloop_transformer.tasks.digits import PermutedDigits, SequentialDigits
from gateloop_transformer.tasks.listops import ListOps
from gateloop_transformer.tasks.memory import MemoryHorizon, SelectiveCopying
from gateloop_transformer.tasks.recall import AssociativeRecall, InductionHeads
from gateloop_transformer.tasks.state_tracking import Counting, ModularArithmetic, Parity, SymmetricGroup
from gateloop_transformer.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Parity,
        Counting,
        ModularArithmetic,
        SymmetricGroup,
        MemoryHorizon,
        AssociativeRecall,
        SelectiveCopying,
        InductionHeads,
        ListOps,
        SequentialDigits,
        PermutedDigits,
    )
}
