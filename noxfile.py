"""The tests on the oldest and the newest versions that are promised, each in an environment of its own below .nox.

`make versions` runs the sessions of `nox.options.sessions`; `nox --list` shows all of them, and
`nox -s lowest-3.12 -- tests/layers` runs one on some of the tests. A session takes several GB: torch comes with
CUDA's libraries. Nothing is written down twice: the oldest versions are those of pyproject.toml.
"""

from __future__ import annotations

from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
# What the tests import; `make` installs the same.
EXTRAS = ("train", "data", "watch", "jax", "hf", "export", "examples", "dev")
# NumPy 1.26 has no wheels for later ones.
OLD_PYTHONS = ("3.10", "3.11", "3.12")
PYTHONS = (*OLD_PYTHONS, "3.13")

nox.options.sessions = ["lowest-3.10", "locked-3.11", "newest-3.13"]
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True


def floors() -> list[str]:
    """A pin of each dependency's lowest version; where it is asked for twice, of the higher one."""
    groups = PROJECT["optional-dependencies"]
    lowest: dict[str, tuple[Version, str]] = {}
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS for text in groups[extra])]:
        requirement = Requirement(text)
        (floor,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
        pin = f"{requirement.name}=={floor}" + (f"; {requirement.marker}" if requirement.marker else "")
        lowest[requirement.name] = max(lowest.get(requirement.name, (floor, pin)), (floor, pin))
    return [pin for _, pin in lowest.values()]


def run(session: nox.Session, install: list[str], test: list[str] | None = None) -> None:
    """Install the library with all extras, then run the tests: those named after `--`, or all."""
    # The oldest packages are older than what TRL needs; its tests are skipped there.
    extras = EXTRAS if session.name.startswith("lowest") else (*EXTRAS, "trl")
    session.install(*install, "--editable", f".[{','.join(extras)}]")
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *(test or []), *(session.posargs or ("-n", "2", "--dist", "loadfile")))


@nox.session(python=OLD_PYTHONS)
def lowest(session: nox.Session) -> None:
    """The lowest version of each dependency."""
    pins = Path(session.create_tmp()) / "lowest.txt"
    pins.write_text("\n".join(floors()) + "\n")
    # Old packages call what has been deprecated since.
    run(session, ["--constraint", str(pins)], ["-W", "default::DeprecationWarning"])


@nox.session(python=("3.11", "3.12", "3.13"))
def locked(session: nox.Session) -> None:
    """What `make` installs."""
    run(session, ["--constraint", "constraints.txt"])


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest version of each dependency that this Python has."""
    run(session, ["--upgrade", "--upgrade-strategy", "eager"])
