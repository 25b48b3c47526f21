"""Files of tensors."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from gateloop_transformer.data.writing import check_removable, remove
from gateloop_transformer.training.storage import read_tensors, write_tensors


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "ä": torch.ones(2, 2, dtype=torch.bfloat16), "a": torch.zeros(0)}
    metadata = {"format": "pt", "model": '{"é": "\\n\\u007f/\t\x01"}', "other": "x", "": "\N{GRINNING FACE}"}
    for n in range(8):
        write_tensors(tmp_path / f"{n}.safetensors", tensors, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    found, said = read_tensors(tmp_path / "0.safetensors")
    assert said == metadata
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_file_that_says_something_of_itself_is_sealed(tmp_path: Path) -> None:
    tensors, path = {"a": torch.arange(64.0)}, tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    assert b"sha256" not in path.read_bytes()
    write_tensors(path, tensors, {"format": "pt"})
    whole = path.read_bytes()
    # Without the key of the checksum the file is as one of another tool.
    key = whole.index(b'"sha256":"')
    for place in [*range(8, key), *range(key + 10, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.safetensors' is damaged"):
            read_tensors(path)
    path.write_bytes(whole)
    assert torch.equal(read_tensors(path)[0]["a"], tensors["a"])


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
