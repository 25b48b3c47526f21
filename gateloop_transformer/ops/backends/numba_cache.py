"""Compiled kernels: found on disk, or compiled and kept there for every later process.

A kernel is one file, named after what went into it: the constants it is made for, this package's sources, the compiler
and the processor. It appears whole or not at all and holds a digest of itself, so whoever reads one waits for nobody
and trusts no damaged one. Only processes that would compile the same kernel wait for each other, so that one does.

Trouble with the disk costs compilations and is said once; it is never an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import cfunc, types
from numba.core.registry import cpu_target

from gateloop_transformer import waiting
from gateloop_transformer.files import cache_folder, lock, write_bytes
from gateloop_transformer.waiting import LOGGER

Constants = ParamSpec("Constants")

_SIGNATURE = types.void(types.CPointer(types.int64))
_KIND = b"gateloop kernel 1"
# Seconds to wait for another process that compiles the same kernel: a kernel takes it a few.
_patience = 120.0
# Held while a kernel is made. A fork waits for it: the compiler's own locks would stay locked in the child for ever.
_making = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


class Code(NamedTuple):
    """Machine code as an object file: the name of its function, the names that it looks for elsewhere, the file."""

    symbol: str
    needs: tuple[str, ...]
    content: bytes


class Kernel:
    """A machine function of one array of integers: its address, and `call`, which lets other Python threads run.

    Raises:
        RuntimeError: the code calls a function that is nowhere.
    """

    def __init__(self, code: Code) -> None:
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        # An engine for each: symbols of kernels that different processes compiled may be the same.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_stubs(code)), machine)
        self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code.content))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(code.symbol)
        self.call = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))(self.address)


def _stubs(code: Code) -> str:
    """Functions, in LLVM's language, in the place of those of Numba's runtime that kernels name and never call.

    Numba loads its runtime only when it compiles; and where one name is not found LLVM leaves all others open too.
    """
    missing = [name for name in code.needs if llvm.address_of_symbol(name) is None]
    if strange := [name for name in missing if not name.startswith(("NRT_", "numba_"))]:
        raise RuntimeError(f"{code.symbol}: there is no {', '.join(strange)} for this kernel to call")
    return "\n".join(f'define void @"{name}"() {{ unreachable }}' for name in missing)


def kernel(build: Callable[Constants, Callable[[Any], None]]) -> Callable[Constants, Kernel]:
    """A decorator: `build`, which makes a Python function for some constants, gives the compiled one instead."""
    _note_sources(build.__module__)

    @functools.cache
    @functools.wraps(build)
    def found(*constants: Constants.args, **_: Constants.kwargs) -> Kernel:
        with _making:
            return _found(build, constants)

    return found  # type: ignore[return-value]


def _found(build: Callable[..., Callable[[Any], None]], constants: tuple[Any, ...]) -> Kernel:
    sources = _sources()
    if sources is None or _imported != {sources}:
        # What runs here is not what lies in the files, or not all of it: such a kernel is nobody else's.
        return Kernel(_compile(build, constants))
    words = [build.__name__, *map(str, constants)]
    key = hashlib.sha256(repr((build.__module__, words, sources, _circumstances())).encode()).hexdigest()
    file = f"{'-'.join(words)}-{key[:16]}.kernel"
    found = _loaded(file)
    if found is None:
        with _turn(file):
            # Perhaps another process has compiled it meanwhile.
            found = _loaded(file)
            if found is None:
                code = _compile(build, constants)
                _keep(file, code)
                found = Kernel(code)
    return found


# Digests of the sources as they were when each module with kernels was imported.
_imported: set[str | None] = set()


@functools.cache
def _note_sources(_module: str) -> None:
    _imported.add(_sources())


def _sources() -> str | None:
    """A digest of the files that kernels are made of, as they are now; None where there are none to read."""
    try:
        contents = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("numba_*.py"))]
    except OSError:
        return None
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else None


@functools.cache
def processor() -> tuple[str, str, frozenset[str]]:
    """What Numba compiles for: triple, name, and the instruction sets that the code may use."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, frozenset(word[1:] for word in features.split(",") if word.startswith("+"))


@functools.cache
def _circumstances() -> tuple[Any, ...]:
    """All that code depends on besides a kernel's constants and the sources."""
    triple, name, features = processor()
    versions = sys.implementation.cache_tag, numba.__version__, llvmlite.__version__
    # Numba's own switches, some of which change the code.
    switches = sorted((word, value) for word, value in os.environ.items() if word.startswith("NUMBA_"))
    given = [(word, value) for word, value in switches if word not in ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS")]
    return versions, triple, name, sorted(features), given


def _compile(build: Callable[..., Callable[[Any], None]], constants: tuple[Any, ...]) -> Code:
    with _told():
        compiled = cfunc(_SIGNATURE)(build(*constants))
        _, _, (content, _) = compiled._library.serialize_using_object_code()
    module = llvm.parse_assembly(compiled.inspect_llvm())
    named = itertools.chain(module.functions, module.global_variables)
    needs = [one.name for one in named if one.is_declaration and not one.name.startswith("llvm.")]
    return Code(compiled.native_name, tuple(needs), content)


_spent = 0.0


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """While this process compiles: a line if that takes it long, all kernels together."""
    global _spent
    start = time.monotonic()
    timer = threading.Timer(max(waiting.PATIENCE - _spent, 0), _tell)
    timer.daemon = True
    # Where no thread can be had nothing is said.
    with contextlib.suppress(RuntimeError):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _spent += time.monotonic() - start


@functools.cache
def _tell() -> None:
    LOGGER.warning("compiling the kernels of gateloop_transformer for this processor: up to a minute, once")


# ---- on disk -----------------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """Where kernels may be, in the order of preference: where Numba's cache was sent, beside the code, the user's."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(given) / "gateloop"]
    folders = [Path(__file__).parent / "__pycache__" / "gateloop"]
    # Without a home there is one place less.
    with contextlib.suppress(ValueError):
        folders.append(cache_folder() / "kernels")
    return folders


@functools.cache
def _warn(what: str) -> None:
    """Once in a process."""
    LOGGER.warning(what)


def _loaded(file: str) -> Kernel | None:
    """None where there is no such file that is whole and can be loaded."""
    damaged = []
    for folder in _folders():
        try:
            kind, digest, rest = (folder / file).read_bytes().split(b"\n", 2)
            if kind == _KIND and digest == _digest(rest):
                symbol, needs, content = rest.split(b"\n", 2)
                return Kernel(Code(symbol.decode(), tuple(needs.decode().split()), content))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, RuntimeError):
            pass
        damaged.append(str(folder / file))
    if damaged:
        _warn(f"a kernel of gateloop_transformer cannot be loaded and is compiled anew: {', '.join(damaged)}")
    return None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _keep(file: str, code: Code) -> None:
    """Write it to the first folder that takes it."""
    rest = b"\n".join([code.symbol.encode(), " ".join(code.needs).encode(), code.content])
    whole = b"\n".join([_KIND, _digest(rest), rest])
    failed: list[str] = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / file, whole, contended=True)
        except OSError as error:
            failed.append(f"{folder}: {error.strerror or error}")
            continue
        return
    _warn(
        f"kernels of gateloop_transformer cannot be kept, so every process compiles its own ({'; '.join(failed)}); "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )


@contextlib.contextmanager
def _turn(file: str) -> Iterator[None]:
    """One process at a time, of those that would compile the same kernel, as far as that can be had.

    The lock is a file of this user's beside the kernel's, and goes with whoever had it: the worst is that two processes
    compile the same. Where the owner does not finish in time it may be stopped: then nobody is waited for again.
    """
    global _patience
    with contextlib.ExitStack() as stack:
        for folder in _folders():
            path = folder / f"{file}.lock"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(path, _patience, 0o600))
                stack.callback(_forget, path)
            except BlockingIOError:
                _patience = 0.0
            except OSError:
                continue
            break
        yield


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
