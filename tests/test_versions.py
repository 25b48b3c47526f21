"""The versions that are promised are the same wherever they are named."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from gateloop_transformer.arguments import check_release

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        spec.loader.exec_module(module)
    return module


def pins(lines: list[str]) -> dict[str, Version]:
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {one.name.lower().replace("_", "-"): Version(next(iter(one.specifier)).version) for one in found}


def test_every_dependency_has_a_floor_that_the_locked_version_is_above(noxfile: ModuleType) -> None:
    floors = pins(noxfile.floors())
    locked = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert floors.keys() <= locked.keys()
    assert {name for name, floor in floors.items() if floor > locked[name]} == set()


def test_make_installs_what_the_sessions_install(noxfile: ModuleType) -> None:
    assert f".[{','.join(noxfile.EXTRAS)},trl]" in (ROOT / "Makefile").read_text()


def test_the_oldest_python_is_the_one_that_is_promised(noxfile: ModuleType) -> None:
    assert noxfile.PROJECT["requires-python"] == f">={noxfile.PYTHONS[0]}"
    assert f'target-version = "py{noxfile.PYTHONS[0].replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()


def test_pages_name_the_floors_of_the_project(noxfile: ModuleType) -> None:
    floors = {name: str(version) for name, version in pins(noxfile.floors()).items()}
    promised = (
        f"torch {floors['torch']}, NumPy {floors['numpy']}, Numba {floors['numba']}, "
        f"JAX {floors['jax']} and transformers {floors['transformers']}"
    )
    assert promised in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    assert promised in re.sub(r"\s+", " ", (ROOT / "docs" / "results" / "versions.md").read_text())
    said = f"transformers {floors['transformers']} or newer"
    assert said in (ROOT / "docs" / "huggingface.md").read_text()
    assert said in (ROOT / "gateloop_transformer" / "huggingface" / "__init__.py").read_text()


def test_a_release_that_is_too_old_is_named() -> None:
    for installed in ("2.7.0", "2.7.0a0+git1234", "2.13.0+cpu", "10.0"):
        check_release("this", "torch", installed, "2.7")
    with pytest.raises(ValueError, match=r"^this needs torch 2\.7 or newer, not 2\.6\.0\+cu124$"):
        check_release("this", "torch", "2.6.0+cu124", "2.7")
