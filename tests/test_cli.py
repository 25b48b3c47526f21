"""The `gateloop` command as a process: its environment, its streams, how it is started."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import processes
import pytest

from gateloop_transformer import waiting
from gateloop_transformer.cli import _COMMANDS, main, progress
from gateloop_transformer.cli.errors import message
from gateloop_transformer.cli.flags import typed
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.tasks.settings import TaskTraining
from gateloop_transformer.tasks.state_tracking import Counting

LINES = "".join(f"{n} times {n} is {n * n}.\n" for n in range(100))


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing set", "spin count set", "wait policy set"],
)
def test_threads_wait_quietly_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    with monkeypatch.context() as patch:
        environment = dict(given)
        patch.setattr(os, "environ", environment)
        with pytest.raises(SystemExit):
            main(["--version"])
    assert environment.get("GOMP_SPINCOUNT") == spins


def gateloop(command: str, cwd: Path) -> Any:
    """A command line of a shell, so that streams can be closed."""
    return processes.run(f"{sys.executable} -m gateloop_transformer {command}", cwd=cwd)


def test_a_closed_standard_output_is_one_line(tmp_path: Path) -> None:
    done = gateloop("generate run --prompt a >&-", tmp_path)
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_standard_output_is_named(tmp_path: Path) -> None:
    done = gateloop("tasks --list > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "gateloop tasks: failed: No space left on device: 'standard output'\n"


def test_with_a_closed_standard_error_nothing_is_said_on_standard_output(tmp_path: Path) -> None:
    done = gateloop("generate run --prompt a 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("error", "message"), [(MemoryError(), "not enough memory"), (OverflowError("too big"), "too big")]
)
def test_too_little_memory_is_a_failure_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail(_arguments: object) -> None:
        raise error

    monkeypatch.setattr("gateloop_transformer.cli.generate.run", fail)
    assert main(["generate", "run", "--prompt", "a"]) == 1
    assert capsys.readouterr().err == f"gateloop generate: failed: {message}\n"


def test_a_name_too_long_is_one_line_without_an_error_number(tmp_path: Path) -> None:
    done = gateloop(f"generate {'x' * 300} --prompt a", tmp_path)
    assert done.returncode == 2
    assert "Errno" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_package_runs_as_the_command(tmp_path: Path) -> None:
    done = gateloop("--version", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("gateloop ")


def test_help_and_version_import_no_torch(tmp_path: Path) -> None:
    code = """if True:
        import contextlib, io, sys
        from gateloop_transformer.cli import _COMMANDS, main
        for words in ["--version"], ["--help"], [], *([name, flag] for name in _COMMANDS for flag in ("-h", "--bad")):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    main(words)
                except SystemExit:
                    pass
            heavy = {"torch", "numba", "jax", "matplotlib", "accelerate", "transformers", "tqdm"} & set(sys.modules)
            assert not heavy, (words, heavy)
    """
    processes.python("-c", code, cwd=tmp_path)


def ended(*words: str) -> int | str | None:
    """The exit code of a command line that ends before the command runs."""
    with pytest.raises(SystemExit) as exit:
        main(list(words))
    return exit.value.code


def flags_in(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[set[str], str]:
    """The long flags that a help has a line for, and its text."""
    assert ended(*words) == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  (--?\w.*)$", text, re.MULTILINE)
    return {flag for line in listed for flag in re.findall(r"--[\w-]+", re.split(r"\s{2}", line)[0])}, text


NAMES = [[name] for name in _COMMANDS] + [["tokenizer", "train"], ["tasks", "counting"]]


@pytest.mark.parametrize("words", NAMES, ids=" ".join)
def test_help_has_the_flags_that_matter_and_help_all_has_all(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    few, text = flags_in(capsys, *words, "--help")
    # --help itself and --help-all are not counted.
    assert len(few - {"--help", "--help-all"}) <= 18
    if "--help-all" not in few:
        return
    every, _ = flags_in(capsys, *words, "--help-all")
    (more,) = re.findall(r"show (\d+) more options", text)
    left_out = every - few
    assert few < every
    # Flags of truth values have a second form.
    assert int(more) == len({flag.replace("--no-", "--") for flag in left_out})


@pytest.mark.parametrize("words", [[], *NAMES], ids=" ".join)
def test_every_command_knows_help_all(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert flags_in(capsys, *words, "--help")[0] <= flags_in(capsys, *words, "--help-all")[0]


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["train"], [TrainingConfig, TransformerConfig]),
        (["sweep"], [TrainingConfig, TransformerConfig]),
        (["tasks", "counting"], [Counting, TaskTraining, TransformerConfig]),
    ],
    ids=["train", "sweep", "tasks"],
)
def test_every_field_has_a_flag_and_common_ones_are_in_the_short_help(
    words: list[str], kinds: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    few, _ = flags_in(capsys, *words, "--help")
    every, _ = flags_in(capsys, *words, "--help-all")
    for kind in kinds:
        for item in dataclasses.fields(kind):
            flag = "--" + item.name.replace("_", "-")
            assert flag in every
            assert (flag in few) == (item.metadata["common"] or kind is Counting), flag


@pytest.mark.parametrize("words", [[], ["tokenizer"]], ids=["gateloop", "gateloop tokenizer"])
def test_a_bare_command_prints_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*words) == 0
    bare = capsys.readouterr()
    assert ended(*words, "--help") == 0
    assert bare == capsys.readouterr()
    assert bare.out.startswith("usage: gateloop")
    assert bare.err == ""


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("trian", "'train'"),
        ("help", "'--help'"),
        ("--verison", "--version"),
        ("tokenizer trian", "'train'"),
        ("tasks partiy", "'parity'"),
        ("train a.txt --out run --stpes 3", "--steps"),
        ("train a.txt --out run --batch_size=3 --max-steps 4", "--batch and --steps"),
        ("train a.txt --out run --preset tinny", "'tiny'"),
        ("tasks parity --gaet ring", "--gate"),
        ("tasks parity --gate rnig", "'ring'"),
        ("read run text --sate s", "--state"),
        ("generate run --pormpt x", "--prompt"),
        ("bench --quik", "--quick"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(
    line: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(*line.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"; did you mean {meant}? (see gateloop" in said


@pytest.mark.parametrize("line", ["train --frobnicate", "frobnicate", "generate run --prompt=--promt --frobnicate"])
def test_what_is_near_to_nothing_is_answered_with_nothing(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*line.split()) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["sweep", "--out", "out", "--grid", "steqs=1,2"], "steps"), (["bench", "--only", "layer"], "layers")],
    ids=["setting", "group"],
)
def test_names_in_values_too(
    words: list[str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert f"; did you mean '{meant}'?" in capsys.readouterr().err


def test_a_line_goes_through_a_pipe_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    monkeypatch.setattr("gateloop_transformer.cli.plot.run", lambda _arguments: seen())

    def seen() -> None:
        sys.stdout.write("a line\n")
        assert pipe.getvalue() == f"a line{os.linesep}".encode()

    assert main(["plot", "run"]) == 0


class Timer:
    """Of `threading`, whose time comes when a test says so."""

    def __init__(self, seconds: float, function: Any, arguments: Any) -> None:
        self.seconds, self.say, self.state = seconds, lambda: function(*arguments), "new"
        timers.append(self)

    def start(self) -> None:
        self.state = "started"

    def cancel(self) -> None:
        self.state = "cancelled"


timers: list[Timer] = []


def test_only_what_takes_long_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(waiting.threading, "Timer", Timer)
    monkeypatch.setattr(waiting, "PATIENCE", 2.0)
    timers.clear()
    said = []

    def work(_arguments: object) -> None:
        with waiting.waiting("lifting"):
            timers[0].say()
            said.append(capsys.readouterr().err)
            assert (timers[0].seconds, timers[0].state) == (2.0, "started")
        assert timers[0].state == "cancelled"

    monkeypatch.setattr("gateloop_transformer.cli.bench.run", work)
    assert main(["bench"]) == 0
    assert said == ["gateloop bench: lifting ...\n"]
    # Where the library is used in other programs nobody listens, and there is nothing to wait for.
    with waiting.waiting("lifting"):
        assert len(timers) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("gateloop_transformer.cli.bench.run", lambda _arguments: waiting.LOGGER.info("lifted"))
    assert main(["bench"]) == 0
    assert capsys.readouterr().err == ""


def test_a_work_of_many_parts_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    monkeypatch.setattr(waiting, "PATIENCE", 2.0)
    monkeypatch.setattr(waiting, "EVERY", 30.0)

    def work(_arguments: object) -> None:
        nonlocal now
        lifted = waiting.Milestones("lifting", 4000, "stone", 1000)
        for seconds in (1.5, 1.0, 29.0, 1.5):
            now += seconds
            lifted.set_postfix({"weight": f"{seconds}"})
            lifted.update(500)

    monkeypatch.setattr("gateloop_transformer.cli.bench.run", work)
    assert main(["bench"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "gateloop bench: lifting: 2,000 of 4,000 stones, weight 1.0",
        "gateloop bench: lifting: 3,000 of 4,000 stones, weight 1.5",
    ]


def test_a_terminal_has_a_bar_once_there_is_something_to_wait_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(waiting, "PATIENCE", 2.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def work(_arguments: object) -> None:
        nonlocal now
        for number, pause in enumerate((0.5, 1.5)):
            with progress.bar("lifting", 1234, "stone") as bar:
                for _ in range(2):
                    bar.set_postfix({"weight": "5"})
                    bar.update(500)
                    now += pause
                bar.update(34)
            assert ("| 1034/1234 [" in capsys.readouterr().err) == bool(number)

    monkeypatch.setattr("gateloop_transformer.cli.bench.run", work)
    assert main(["bench"]) == 0


def commands(folder: Path) -> dict[str, list[str]]:
    """A command line of each kind that works with a run, and what each says that it is doing."""
    data, run = str(folder / "data.txt"), str(folder / "run")
    small = [*("--dim", "8", "--depth", "1", "--context", "16", "--batch", "2", "--eval-bytes", "64")]
    return {
        "train": ["train", data, "--out", run, *small, "--steps", "2", "--sample-bytes", "4", "--json"],
        "resume": ["train", "--out", run, "--resume", "--steps", "3", "--json"],
        "generate": ["generate", run, "--prompt", "a", "--tokens", "2"],
        "beams": ["generate", run, "--prompt", "a", "--tokens", "2", "--num-beams", "2"],
        "read": ["read", run, data, "--state", str(folder / "state"), "--json"],
        "eval": ["eval", run, data, "--json"],
        "suite": ["eval", run, data, "--suite", "--json"],
        "inspect": ["inspect", run, "--text", "some text", "--json"],
        "plot": ["plot", run, "--out", str(folder / "curves.png"), "--json"],
        "tokenizer": ["tokenizer", "train", data, "--vocab-size", "260", "--out", str(folder / "bpe.json"), "--json"],
        "tasks": ["tasks", "parity", "--steps", "1", "--lengths", "9", "--out", str(folder / "task"), "--json"],
    }


SAID = {
    "train": [
        *("importing torch ...", "importing matplotlib ...", "reading the data ..."),
        *("tokenising the data: ", "setting up the model ...", "estimating what the run needs ..."),
        *("taking the first step ...", "training: 1 of 2 steps, loss ", "training: 2 of 2 steps, loss "),
        *("validating after step 2 ...", "saving step 2 ..."),
    ],
    "resume": ["reading the newest checkpoint ...", "taking the first step ...", "training: 3 of 3 steps, loss "],
    "generate": ["importing torch ...", "loading the model ...", "reading the prompt ..."],
    "beams": ["loading the model ...", "searching with 2 beams ..."],
    "read": ["importing torch ...", "loading the model ...", "computing the checksum of the weights ...", "reading: "],
    "eval": ["importing torch ...", "opening the data ...", "loading the model ...", "evaluating: "],
    "suite": ["tokenising the data ...", "reading whole documents: ", "reading windows: "],
    "inspect": [
        "importing torch and matplotlib ...",
        "loading the model ...",
        "reading the text ...",
        "drawing: 1 of 1 ",
    ],
    "plot": ["reading the runs ...", "drawing ..."],
    "tokenizer": ["opening the data ...", "reading: ", "learning tokens from what was read ..."],
    "tasks": ["importing torch ...", "training: 1 of 1 steps", "testing on sequences of 9 tokens ...", "drawing ..."],
}


@pytest.mark.usefixtures("impatient")
def test_whatever_may_take_long_has_a_line_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.txt").write_text(LINES)
    for name, words in commands(tmp_path).items():
        assert main(words) == 0
        out, err = capsys.readouterr()
        if "--json" in words:
            json.loads(out)
        lines = [line.removeprefix(f"gateloop {words[0]}: ") for line in err.splitlines()]
        for expected in SAID[name]:
            # In this order.
            while lines and not lines[0].startswith(expected):
                lines.pop(0)
            assert lines, (name, expected, err)


def test_a_backend_that_is_not_installed_keeps_nobody_from_drawing(tmp_path: Path) -> None:
    # As where a notebook sets it for all that it starts. No torch: what draws is imported alone.
    code = (
        "from pathlib import Path; from gateloop_transformer.pictures import empty_figure, save_png; import os; "
        "save_png(empty_figure(1, 1), Path('a.png')); print(os.environ['MPLBACKEND']); "
        "import matplotlib; print(matplotlib.rcParams['backend'])"
    )
    for backend, kept in (("not_installed_anywhere", None), ("svg", "svg")):
        said = processes.python("-c", code, cwd=tmp_path, env=os.environ | {"MPLBACKEND": backend}).splitlines()
        assert said[0] == backend
        assert kept in (None, said[1])
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_texts_of_the_command_line_are_utf8_in_every_locale() -> None:
    # As Python gives what is typed: in UTF-8, in Latin-1, and where the locale has no letters beyond ASCII.
    assert typed("ü") == typed("\udcc3\udcbc") == b"\xc3\xbc"
    assert typed("\udcff") == b"\xff"


def test_long_and_untold_messages_are_one_line() -> None:
    assert message(ValueError("a" * 5000 + "\nb")) == "a" * 2000 + " ..."
    assert message(UnicodeEncodeError("ascii", "aä", 1, 2, "")) == (
        "'ä' cannot be written in the encoding ascii: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    )
