"""Reading, splitting and batching of bytes."""

from __future__ import annotations

import gzip
import itertools
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gateloop_transformer.training.data import batch_at, load_corpus, read_documents, standard_library, stream_at


def folder_of_texts(root: Path, count: int = 20) -> Path:
    for n in range(count):
        path = root / f"sub{n % 3}" / f"{n:02d}.txt"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes([65 + n]) * 100)
    return root


def test_a_file_is_cut_near_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    corpus = load_corpus(str(tmp_path / "a.txt"), 0.1, 8)
    assert corpus.train.tolist() == list(range(1, 91))
    assert corpus.valid.tolist() == list(range(91, 101))


def test_a_folder_is_split_by_file_whatever_the_machine(tmp_path: Path) -> None:
    corpora = [load_corpus(str(folder_of_texts(tmp_path / name)), 0.1, 8) for name in ("a", "b")]
    assert corpora[0].sha256 == corpora[1].sha256
    train, valid = (set(part.tolist()) for part in (corpora[0].train, corpora[0].valid))
    assert not train & valid
    assert len(corpora[0].valid) == 200
    assert len(corpora[0].train) == 1800


@pytest.mark.parametrize("names", [("book.txt", "note.md"), ("a.txt", "z.md"), ("1", "2")])
def test_a_large_file_is_never_held_out_whole(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / names[0]).write_bytes(b"x" * 6000)
    (tmp_path / names[1]).write_bytes(b"y" * 30)
    corpus = load_corpus(str(tmp_path), 0.1, 8)
    assert len(corpus.train) > 5000
    assert 300 < len(corpus.valid) < 1300


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    documents, _ = read_documents(str(tmp_path))
    assert [document.name for document in documents] == ["a.txt"]
    with pytest.raises(ValueError, match="regular file"):
        read_documents(str(tmp_path / "pipe"))


def test_compressed_files_are_read(tmp_path: Path) -> None:
    text = b"some text\n" * 10
    (tmp_path / "a.gz").write_bytes(gzip.compress(text))
    (tmp_path / "b.xz").write_bytes(lzma.compress(text))
    documents, _ = read_documents(str(tmp_path))
    assert [document.content for document in documents] == [text, text]


def test_globs_choose_files(tmp_path: Path) -> None:
    folder_of_texts(tmp_path)
    documents, _ = read_documents(str(tmp_path / "**" / "0*.txt"))
    assert len(documents) == 10


def test_binary_empty_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\0\1\2")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_text("secret")
    documents, skipped = read_documents(str(tmp_path))
    assert [document.name for document in documents] == ["a.txt"]
    assert skipped == 2


def test_the_standard_library_is_text_without_tests() -> None:
    documents = standard_library()
    names = {document.name for document in documents}
    assert "argparse.py" in names
    assert not any(name.startswith("test/") for name in names)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (None, ".txt", "no file, folder or glob match"),
        (b"", ".txt", "is empty"),
        (b"\0" * 50, ".txt", "binary"),
        (b"short", ".txt", "too short"),
        (b"not gzip", ".gz", "cannot decompress"),
        (gzip.compress(b"text" * 99)[:-9], ".gz", "cannot decompress"),
        (b"not xz", ".xz", "cannot decompress"),
        (lzma.compress(b"text" * 99)[:-9], ".xz", "cannot decompress"),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, content: bytes | None, suffix: str, message: str) -> None:
    path = tmp_path / f"data{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(path), 0.1, 64)


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("text")
    with pytest.raises(ValueError, match="holds no files"):
        load_corpus(str(tmp_path), 0.1, 64)


def test_batches_depend_on_the_step_alone() -> None:
    train = np.arange(1000, dtype=np.uint8)
    later = batch_at(train, 7, 0, 4, 16, seed=1)
    assert later.shape == (4, 17)
    assert later.equal(batch_at(train, 7, 0, 4, 16, seed=1))
    for other in (batch_at(train, 8, 0, 4, 16, 1), batch_at(train, 7, 1, 4, 16, 1), batch_at(train, 7, 0, 4, 16, 2)):
        assert not later.equal(other)


def test_batches_reach_both_ends() -> None:
    train = np.arange(20, dtype=np.uint8)
    starts = {row[0].item() for step in range(50) for row in batch_at(train, step, 0, 4, 16, 0)}
    assert starts == {0, 1, 2, 3}


def test_streams_go_on_where_they_ended_and_begin_again_after_the_end() -> None:
    data = np.arange(103, dtype=np.uint8)
    steps = [[stream_at(data, step, micro, 2, 2, 10, 5) for micro in (0, 1)] for step in range(1, 25)]
    rows = [torch.cat([ids for ids, _ in micros]) for micros in steps]
    for before, after in itertools.pairwise(rows):
        goes_on = after[:, 0] == before[:, -1]
        anew = after[:, 0] == min(row[:, 0].min() for row in rows)
        assert (goes_on | anew).all()
    # Every stream sees all windows, each once in ten steps, and is reset at the first alone.
    for row in range(4):
        assert len({int(ids[row, 0]) for ids in rows[:10]}) == 10
    for micros, together in zip(steps, rows, strict=True):
        first = together[:, 0] == rows[0].min()
        marks = [torch.zeros(2, 11, dtype=torch.bool) if resets is None else resets for _, resets in micros]
        assert torch.equal(torch.cat(marks)[:, 0], first)
        assert not torch.cat(marks)[:, 1:].any()
