"""Compiled kernels on disk: found again by every later process, and never a reason to fail."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from numba import carray

from gateloop_transformer import waiting
from gateloop_transformer.ops.backends import numba_cache, numba_cpu
from gateloop_transformer.ops.dispatch import choose


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kernels go in this test."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    numba_cache._warn.cache_clear()
    yield tmp_path / "gateloop"
    numba_cache._warn.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled."""
    done: list[str] = []
    original = numba_cache._compile

    def counted(build: Callable[..., Any], constants: tuple[Any, ...]) -> Any:
        done.append(build.__name__)
        return original(build, constants)

    monkeypatch.setattr(numba_cache, "_compile", counted)
    return done


def times(FACTOR: int) -> Callable[[Any], None]:
    """A kernel that multiplies its first argument."""

    def run(pointer: Any) -> None:
        p = carray(pointer, (1,))
        p[0] = p[0] * FACTOR

    return run


def result(factor: int = 3) -> int:
    """7 times the factor by a kernel that this process has not loaded yet."""
    block = (ctypes.c_int64 * 1)(7)
    kernel = numba_cache.kernel(times)(factor)
    kernel.call(block)
    return block[0]


def test_a_kernel_is_compiled_once_for_each_constant(folder: Path, compilations: list[str]) -> None:
    assert [result(3), result(3), result(5), result(3)] == [21, 21, 35, 21]
    assert compilations == ["times", "times"]
    assert len(list(folder.glob("times-*.kernel"))) == 2


def test_other_sources_have_other_kernels(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result()
    monkeypatch.setattr(numba_cache, "_circumstances", lambda: ("another version",))
    result()
    assert compilations == ["times", "times"]
    assert len(list(folder.glob("*.kernel"))) == 2


def test_kernels_of_files_that_changed_since_their_import_are_nobody_elses(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result()
    monkeypatch.setattr(numba_cache, "_imported", set(numba_cache._imported))
    for sources in ("edited", None):
        monkeypatch.setattr(numba_cache, "_sources", lambda sources=sources: sources)
        assert result() == 21
    assert compilations == ["times"] * 3
    assert len(list(folder.glob("*.kernel"))) == 1


def test_a_kernel_that_asks_for_what_is_not_there_is_compiled_anew(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = numba_cache._digest
    result()
    (file,) = folder.glob("*.kernel")
    kind, _, rest = file.read_bytes().split(b"\n", 2)
    symbol, needs, content = rest.split(b"\n", 2)
    rest = b"\n".join([symbol, needs + b" no_such_function", content])
    file.write_bytes(b"\n".join([kind, original(rest), rest]))
    assert result() == 21
    assert compilations == ["times", "times"]


@pytest.mark.parametrize("damage", ["empty", "cut short", "one bit", "a folder in its place", "another format"])
def test_a_damaged_kernel_is_compiled_anew(
    folder: Path, compilations: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    result()
    (file,) = folder.glob("*.kernel")
    content = file.read_bytes()
    if damage == "a folder in its place":
        file.unlink()
        file.mkdir()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        damaged = {"empty": b"", "cut short": content[:middle], "one bit": flipped, "another format": b"x\n" + content}
        file.write_bytes(damaged[damage])
    assert result() == 21
    assert compilations == ["times", "times"]
    said = [record for record in caplog.records if str(file) in record.getMessage()]
    assert said
    if damage != "a folder in its place":
        # The damaged one is replaced.
        assert result() == 21
        assert compilations == ["times", "times"]
        assert len(said) == 1


def test_where_nothing_can_be_kept_kernels_work_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    numba_cache._warn.cache_clear()
    assert [result(3), result(5)] == [21, 35]
    said = [record for record in caplog.records if "set NUMBA_CACHE_DIR" in record.getMessage()]
    assert len(said) == 1


def test_a_full_disk_leaves_no_file_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert result() == 21
    assert list(folder.iterdir()) == []


def test_kernels_of_a_folder_that_cannot_be_written_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """As in an image that was built with kernels: the first folder holds them, and takes no more."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    monkeypatch.setattr(numba_cache, "_folders", lambda: [shared])
    result()
    monkeypatch.setattr(numba_cache, "_folders", lambda: [own, shared])
    assert result() == 21
    assert compilations == ["times"]


def test_no_home_is_one_place_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUMBA_CACHE_DIR", "GATELOOP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert len(numba_cache._folders()) == 2

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert len(numba_cache._folders()) == 1


HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(folder: Path) -> Path:
    """The lock of a kernel, held by another process, which ends with the test."""
    result()
    (file,) = folder.glob("*.kernel")
    lock = file.with_name(f"{file.name}.lock")
    command = [sys.executable, "-S", "-c", HOLD, str(lock)]
    process = processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return file


@pytest.mark.usefixtures("held")
def test_a_kernel_that_is_there_is_loaded_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_turn(file: str) -> None:
        raise AssertionError(f"it waits for {file}")

    monkeypatch.setattr(numba_cache, "_turn", no_turn)
    assert result() == 21


def test_a_lock_that_is_not_given_back_ends_in_compilation(
    held: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    monkeypatch.setattr(numba_cache, "_patience", 0.1)
    held.unlink()
    assert result() == 21
    assert compilations == ["times"]
    # Nobody waits again.
    assert numba_cache._patience == 0


def test_a_lock_follows_no_link(folder: Path, tmp_path: Path, compilations: list[str]) -> None:
    result()
    (file,) = folder.glob("*.kernel")
    precious, lock = tmp_path / "precious.txt", file.with_name(f"{file.name}.lock")
    precious.write_text("keep me")
    # Nor is anything made where a link leads.
    for target in (precious, tmp_path / "planted"):
        file.unlink()
        lock.symlink_to(target)
        assert result() == 21
        assert lock.is_symlink()
        lock.unlink()
    assert compilations == ["times"] * 3
    assert precious.read_text() == "keep me"
    assert not (tmp_path / "planted").exists()


FORKED = """
import ctypes, os
from numba import carray
from gateloop_transformer.ops.backends import numba_cache

def times(FACTOR):
    def run(pointer):
        p = carray(pointer, (1,))
        p[0] = p[0] * FACTOR
    return run

def forking(build, constants):
    if not children:
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        children.append(child)
    return original(build, constants)

def no_wait(seconds):
    raise AssertionError("it waits for its own child")

children, original = [], numba_cache._compile
read, write = os.pipe()
numba_cache._compile, numba_cache.time.sleep = forking, no_wait
for factor in (3, 5):
    kernel, block = numba_cache.kernel(times)(factor), (ctypes.c_int64 * 1)(7)
    kernel.call(block)
    print(block[0])
os.write(write, b".")
print(os.waitpid(children[0], 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_holds_no_lock(folder: Path) -> None:
    """Forked while the parent compiles, as a DataLoader's workers may be."""
    assert processes.python("-c", FORKED) == "21\n35\n0\n"


FORKED_BESIDE = """
import os, threading
from gateloop_transformer.ops.backends import numba_cache

def times(FACTOR):
    def run(pointer):
        pass
    return run

def compiling(build, constants):
    begun.set()
    return original(build, constants)

begun, original = threading.Event(), numba_cache._compile
numba_cache._compile = compiling
thread = threading.Thread(target=numba_cache.kernel(times), args=(3,))
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    os._exit(0 if numba_cache._making.acquire(blocking=False) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.usefixtures("folder")
def test_a_fork_beside_a_thread_that_compiles_can_compile_too() -> None:
    assert processes.python("-c", FORKED_BESIDE) == "0\n"


def test_what_takes_long_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    numba_cache._tell.cache_clear()
    result(3)
    result(5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "compiling the kernels" in caplog.text


EVERY_LAYER = """
import sys, torch
from gateloop_transformer import Bidirectional, CausalFullAttention
from gateloop_transformer import GateLoopedAttention, SimpleGateLoopLayer, Transformer
from gateloop_transformer.ops.backends import numba_cache

compiled, original = [], numba_cache._compile
numba_cache._compile = lambda build, constants: compiled.append(build.__name__) or original(build, constants)
layers = [
    GateLoopedAttention(32, gate="ring", conv_size=3, conv_silu=True),
    GateLoopedAttention(32, heads=16, head_norm=True, qk_norm=True),
    GateLoopedAttention(32, heads=2, gate="paper", conv_size=2),
    SimpleGateLoopLayer(32),
    SimpleGateLoopLayer(32, use_heinsen=True),
    CausalFullAttention(32, heads=2, qk_norm=True, data_dependent_rel_pos="gate_loop"),
    Bidirectional(GateLoopedAttention, 32),
]
for layer in layers:
    x = torch.randn(2, 40, 32, requires_grad=True)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x[:, :1])
model = Transformer(dim=32, num_tokens=8, depth=2, gate="ring", conv_size=4)
model(torch.zeros(1, 9, dtype=torch.long), return_loss=True).backward()
with torch.autocast("cpu", torch.bfloat16):
    model(torch.zeros(1, 9, dtype=torch.long), return_loss=True).backward()
model.generate(torch.zeros(1, 3, dtype=torch.long), 3)
"""


def test_a_second_process_compiles_nothing() -> None:
    first: dict[str, Any] = {}
    exec(EVERY_LAYER, first)
    assert processes.python("-c", EVERY_LAYER + "\nprint(compiled)\n") == "[]\n"
    numba_cache._compile = first["original"]


SCAN = """
import torch
from gateloop_transformer.ops import linear_scan
a, x = torch.rand(2, 20, 40), torch.randn(2, 20, 40)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    y, expected = (linear_scan(a.to(dtype), x.to(dtype), backend=name) for name in ("auto", "eager"))
    assert torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-5), dtype
"""


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["CPU_NAME=generic", "OPT=0", "BOUNDSCHECK=1", "DEBUGINFO=1", "DISABLE_JIT=1"])
def test_numbers_are_right_whatever_numba_is_told(tmp_path: Path, switch: str) -> None:
    """On a processor without any extension too, float16 included; in a second process as in the first."""
    name, value = switch.split("=")
    given = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), f"NUMBA_{name}": value}
    for _ in range(2):
        processes.python("-c", SCAN, env=given)


def test_float16_needs_instructions_that_convert_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cache, "processor", lambda: ("x86_64-linux", "generic", frozenset()))
    numba_cpu._converts_half.cache_clear()
    try:
        assert choose("auto", torch.device("cpu"), torch.float16) != "numba"
        assert choose("auto", torch.device("cpu"), torch.bfloat16) == "numba"
        with pytest.raises(NotImplementedError, match="converts float16"):
            choose("numba", torch.device("cpu"), torch.float16)
    finally:
        numba_cpu._converts_half.cache_clear()


def test_a_numba_that_compiles_nothing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cpu, "_DISABLED", True)
    assert choose("auto", torch.device("cpu"), torch.float32) != "numba"
    with pytest.raises(NotImplementedError, match="NUMBA_DISABLE_JIT is set: unset it"):
        choose("numba", torch.device("cpu"), torch.float32)
