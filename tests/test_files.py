"""Files and folders that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import processes
import pytest

from gateloop_transformer.files import aside, check_removable, lock, remove, replacing, write_bytes, write_text


@pytest.mark.parametrize("contended", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_what_was_there_stays_where_writing_ends_early(tmp_path: Path, error: BaseException, contended: bool) -> None:
    path, folder = tmp_path / "a", tmp_path / "b"
    write_text(path, "old")
    folder.mkdir()
    for target in (path, folder):
        with pytest.raises(type(error)), replacing(target, contended) as other:  # noqa: PT012
            if target == path:
                other.write_text("ne")
            else:
                other.mkdir()
                (other / "c").touch()
            raise error
    assert path.read_text() == "old"
    assert {each.name for each in tmp_path.rglob("*")} == {"a", "b"}


def test_folders_replace_folders_and_links(tmp_path: Path) -> None:
    folder, link = tmp_path / "a", tmp_path / "link"
    for name in ("old", "new"):
        with replacing(folder) as other:
            other.mkdir()
            (other / name).touch()
    assert [each.name for each in folder.iterdir()] == ["new"]
    link.symlink_to(folder)
    write_bytes(link, b"a file")
    assert not link.is_symlink()
    assert [each.name for each in folder.iterdir()] == ["new"]


def test_what_a_killed_process_left_is_not_gone_on_with(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    for leave in (Path.touch, Path.mkdir, lambda path: path.symlink_to(precious)):
        leave(tmp_path / "a.partial")
        write_bytes(tmp_path / "a", b"whole")
        assert (tmp_path / "a").read_bytes() == b"whole"
    assert precious.read_text() == "keep me"
    assert len(list(tmp_path.iterdir())) == 2


def test_names_are_apart_where_many_write_the_same(tmp_path: Path) -> None:
    with aside(tmp_path / "a", contended=True) as one, aside(tmp_path / "a", contended=True) as other:
        assert one != other
        assert one.parent == other.parent == tmp_path


def test_a_lock_is_had_by_one_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock(path) as trouble:
        assert trouble is None
        for patience in (0, 0.03):
            with pytest.raises(BlockingIOError, match="another process holds the lock"), lock(path, patience):
                pass
    with lock(path, mode=0o600) as trouble:
        assert trouble is None
    assert path.exists()


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "planted")
    with pytest.raises(OSError, match="symbolic links"), lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "planted").exists()


def test_where_files_cannot_be_locked_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOLCK, errno.ENOSYS):

        def refuse(_file: int, _how: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", refuse)
        with lock(tmp_path / "lock") as trouble:
            assert trouble is not None
            assert trouble.errno == number


FORKED = """
import os, signal, sys, pathlib
from gateloop_transformer.files import lock

path = pathlib.Path(sys.argv[1])
begun, going = os.pipe(), os.pipe()
parent = os.fork()
if parent == 0:
    with lock(path):
        if os.fork() == 0:
            # It lives on when the owner of the lock has been killed.
            os.write(begun[1], b".")
        os.close(going[1])
        os.read(going[0], 1)
        os._exit(0)
os.read(begun[0], 1)
try:
    lock(path).__enter__()
except BlockingIOError:
    print("held")
os.kill(parent, signal.SIGKILL)
os.waitpid(parent, 0)
with lock(path) as trouble:
    print(trouble)
os.write(going[1], b".")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_lock_dies_with_its_process_whoever_was_forked_meanwhile(tmp_path: Path) -> None:
    assert processes.python("-c", FORKED, str(tmp_path / "lock")) == "held\nNone\n"


def test_what_may_not_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    real = os.access
    for closed, path, fine in (
        (inner, tmp_path / "a", False),
        (tmp_path, tmp_path / "a", False),
        (tmp_path / "a", tmp_path / "a", False),
        (tmp_path / "a", tmp_path / "link", True),
        (tmp_path / "other", tmp_path / "a", True),
    ):
        monkeypatch.setattr(os, "access", lambda each, mode, closed=closed: each != closed and real(each, mode))
        with contextlib.nullcontext() if fine else pytest.raises(ValueError, match=f"'{closed}' may not be changed"):
            check_removable(path)
    remove(tmp_path / "link")
    assert inner.is_dir()
    remove(tmp_path / "a")
    assert os.listdir(tmp_path) == []
