"""The command `gateloop tasks`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateloop_transformer.cli.flags import add_fields, folder
from gateloop_transformer.cli.parser import Parser
from gateloop_transformer.cli.progress import bar, importing
from gateloop_transformer.waiting import waiting

if TYPE_CHECKING:
    from gateloop_transformer.tasks.curriculum import Progress
    from gateloop_transformer.tasks.experiment import Experiment, Outcome
    from gateloop_transformer.tasks.task import Task

RESULT, PICTURE = "result.json", "accuracy.png"
HELP = "train a model on a synthetic task and score it by length"
DESCRIPTION = (
    "Train a small model on a synthetic task, in minutes on a CPU, and score it by length and by span. "
    f"DIR gets {RESULT} and {PICTURE}. Without NAME, list the tasks."
)


def add_arguments(parser: Parser) -> None:
    """Add the command's flags, and a subcommand for each task."""
    from gateloop_transformer.tasks.table import TASKS

    parser.add_argument("--list", action="store_true", help="list the tasks")
    names = parser.add_subparsers(dest="task", metavar="NAME")
    for name, task in TASKS.items():
        about = (task.__doc__ or "").splitlines()[0]
        fill = functools.partial(_add_arguments, task=task)
        names.add_parser(name, help=task.summary, description=about, fill=fill)


def _add_arguments(parser: Parser, task: type[Task]) -> None:
    """Add a task's flags."""
    from gateloop_transformer.configuration import TransformerConfig
    from gateloop_transformer.tasks.settings import TaskTraining, defaults

    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="folder for the results, which replace earlier ones there "
        f"(default: {Path('runs', 'tasks', task.name)}, or if that is taken {task.name}-2 and so on)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, not as a table")
    start = defaults(task)
    if dataclasses.fields(task):
        add_fields(parser, task, "task", start, common=True)
    add_fields(parser, TaskTraining, "training and test", start)
    add_fields(parser, TransformerConfig, "model", start)


def run(arguments: argparse.Namespace) -> None:
    """Run a task, or list the tasks."""
    from gateloop_transformer.tasks.table import TASKS

    if arguments.task is None:
        width = max(map(len, TASKS))
        for name, task in TASKS.items():
            print(f"{name:{width}}  {task.summary}")
        return
    if arguments.list:
        raise ValueError("--list takes no NAME")
    with importing("torch"):
        from gateloop_transformer.tasks.experiment import Experiment

    own = {"command", "task", "list", "out", "json"}
    experiment = Experiment.of(
        TASKS[arguments.task], {name: value for name, value in vars(arguments).items() if name not in own}
    )
    if (out := arguments.out) is None:
        usual = Path("runs", "tasks", arguments.task)
        out = _free(usual)
        if out != usual:
            print(f"gateloop tasks: {str(usual)!r} already has results: these go to {str(out)!r}", file=sys.stderr)
    outcome = _run(experiment, out)
    print(json.dumps(outcome.to_json()) if arguments.json else _table(outcome, out))


def _free(folder: Path) -> Path:
    """The folder, or the first numbered one after it without a result, so that no result is replaced unasked."""
    numbered = itertools.chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2)))
    return next(each for each in numbered if not (each / RESULT).exists())


def _run(experiment: Experiment, out: Path) -> Outcome:
    """Train and score, and write the results."""
    from gateloop_transformer.files import make_folder, write_text
    from gateloop_transformer.pictures import load_matplotlib
    from gateloop_transformer.tasks.experiment import run
    from gateloop_transformer.tasks.plot import draw_accuracy

    with importing("matplotlib"):
        load_matplotlib()
    make_folder(out)
    with bar("training", experiment.training.steps, "step") as shown:
        outcome = run(experiment, lambda progress: _show(shown, progress))
    result = outcome.to_json()
    write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    with waiting("drawing"):
        draw_accuracy(result, out / PICTURE)
    return outcome


def _show(shown: Any, progress: Progress) -> None:
    if progress.step % 20 == 0:
        numbers = {"length": progress.longest, "right": f"{progress.accuracy:.3f}", "loss": f"{progress.loss:.4f}"}
        shown.set_postfix(numbers, refresh=False)
    shown.update(1)


def _table(outcome: Outcome, out: Path) -> str:
    """Describe the outcome in a few lines."""
    result = outcome.to_json()
    first, longest = result["trained_lengths"]
    lines = [
        f"{result['task']}: {result['model']}, {result['parameters']:,} parameters, {result['steps']} steps in "
        f"{result['seconds']:.0f} s on lengths {first} to {longest}",
        f"{'length':>12}  {'last answer':>11}  {'all answers':>11}  {'constant':>8}",
    ]
    for length, last in result["accuracy_by_length"].items():
        every, constant = result["accuracy_of_all_by_length"][length], result["commonest_by_length"][length]
        lines.append(f"{int(length):>12,}  {last:>11.1%}  {every:>11.1%}  {constant:>8.1%}")
    if "accuracy_by_span" in result:
        lines.append(f"{'span':>12}  {'answers':>11}")
        lines += [f"{span:>12}  {right:>11.1%}" for span, right in result["accuracy_by_span"].items()]
    return "\n".join([*lines, f"results: {out / RESULT}, {out / PICTURE}"])
