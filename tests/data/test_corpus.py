"""Corpora: what is in the cache is what the documents were, whole or not at all, split and hashed alike everywhere."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import processes
import pytest
from cases import give, lines

from gateloop_transformer.data import corpus, shards
from gateloop_transformer.data.bpe import BPETokenizer, train_tokenizer
from gateloop_transformer.data.corpus import Corpus, load_corpus
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.files import cache_folder, lock

TEXT = "".join(f"{n} times {n} is {n * n}, ünd so.\n" for n in range(300)).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GATELOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_tokenizer([[TEXT]], 300)


def load(source: Path | str | None, **options: Any) -> Corpus:
    given = {"valid_fraction": 0.1, "context": 8, "tokenizer": ByteTokenizer(), **options}
    return load_corpus(None if source is None else str(source), **given)


def whole(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


def folder_of_texts(root: Path, count: int = 200) -> Path:
    for n in range(count):
        path = root / f"sub{n % 3}" / f"{n:02d}.txt"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes([32 + n % 90]) * (20 + n % 7))
    return root


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_cut_near_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    found = load(tmp_path / "a.txt")
    assert whole(found.train) == list(range(1, 91))
    assert whole(found.valid) == list(range(91, 101))
    assert "1 file, the end held out, 90 training and 10 validation bytes" in found.description


def test_a_folder_is_split_by_document_whatever_the_machine(tmp_path: Path) -> None:
    found = [load(folder_of_texts(tmp_path / name)) for name in ("a", "b")]
    assert found[0].sha256 == found[1].sha256
    total = sum(20 + n % 7 for n in range(200))
    assert len(found[0].train) + len(found[0].valid) == total
    assert 0.05 < len(found[0].valid) / total < 0.2
    for part in (found[0].train, found[0].valid):
        starts = part.starts(0, len(part)).tolist()
        documents = np.split(part.read(0, len(part)), starts[1:])
        assert starts[0] == 0
        assert all(len(set(document.tolist())) == 1 and 20 <= len(document) <= 26 for document in documents)


@pytest.mark.parametrize("names", [("book.txt", "note.md"), ("a.txt", "z.md"), ("1", "2")])
def test_a_large_file_is_never_held_out_whole(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / names[0]).write_bytes(b"x" * 6000)
    (tmp_path / "data" / names[1]).write_bytes(b"y" * 30)
    found = load(tmp_path / "data")
    assert len(found.train) == round(6030 * 0.9)
    assert sorted(whole(found.train) + whole(found.valid)) == [ord("x")] * 6000 + [ord("y")] * 30


@pytest.mark.parametrize("limit", [100, 1000])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_files_of_any_size_hold_the_same_corpus(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, bpe: BPETokenizer, limit: int, kind: str
) -> None:
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    (tmp_path / "a.jsonl").write_bytes(lines([TEXT[n : n + 50].decode(errors="ignore") for n in range(0, 3000, 40)]))
    one = load(tmp_path / "a.jsonl", tokenizer=tokenizer)
    [folder] = entries(own_cache)
    os.rename(folder, tmp_path / "kept")
    monkeypatch.setattr(shards, "SHARD", limit)
    monkeypatch.setattr(corpus, "_TOGETHER", 70)
    monkeypatch.setattr(corpus, "Writer", lambda *arguments: shards.Writer(*arguments, limit))
    many = load(tmp_path / "a.jsonl", tokenizer=tokenizer)
    assert len(list(entries(own_cache)[0].glob("train-*.bin"))) > len(list((tmp_path / "kept").glob("train-*.bin")))
    assert many.sha256 == one.sha256
    for before, after in ((one.train, many.train), (one.valid, many.valid)):
        assert whole(before) == whole(after)
        assert before.starts(0, len(before)).tolist() == after.starts(0, len(after)).tolist()
        for start in range(0, len(before) - 30, 17):
            assert after.read(start, start + 30).tolist() == whole(before)[start : start + 30]


def test_documents_come_back_from_their_tokens(tmp_path: Path, bpe: BPETokenizer) -> None:
    texts = [f"document {n} of ünd <|endoftext|>\n" * (1 + n % 4) for n in range(100)]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    found = load(tmp_path / "a.jsonl", tokenizer=bpe)
    back = []
    for part in (found.train, found.valid):
        for ids in np.split(part.read(0, len(part)), part.starts(1, len(part))):
            assert ids[-1] == bpe.end
            assert bpe.end not in ids[:-1]
            back.append(bpe.decode(ids))
    assert sorted(back) == sorted(text.encode() for text in texts)
    assert "1 file, 100 documents, " in found.description
    assert "validation tokens of " in found.description


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_moved_and_packed_data_is_the_same(tmp_path: Path, suffix: str) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "elsewhere" / f"two.jsonl{suffix}"
    one.write_bytes(lines([f"text {n}" for n in range(100)]))
    two.parent.mkdir()
    two.write_bytes(gzip.compress(one.read_bytes()) if suffix else one.read_bytes())
    assert load(one).sha256 == load(two).sha256


def test_what_differs_has_another_hash(tmp_path: Path, bpe: BPETokenizer) -> None:
    found = []
    for n, texts in enumerate((["a", "bcd"] * 50, ["ab", "cd"] * 50, ["a", "bcd"] * 49 + ["a", "bce"])):
        path = tmp_path / f"{n}.jsonl"
        path.write_bytes(lines(texts))
        found.append(load(path).sha256)
    found += [load(path, tokenizer=bpe).sha256, load(path, valid_fraction=0.3).sha256]
    assert len(set(found)) == 5


def test_a_corpus_is_made_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    first = load(path)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_build", None)
        assert load(path, context=16).sha256 == first.sha256
    path.write_bytes(TEXT + b"more")
    assert load(path).sha256 != first.sha256
    assert load(path, valid_fraction=0.2).sha256 != first.sha256
    assert len(entries(own_cache)) == 3


@pytest.mark.parametrize("damage", ["shard", "starts", "meta", "no meta", "format", "absent"])
def test_a_damaged_corpus_is_made_again(tmp_path: Path, own_cache: Path, damage: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    first = load(path)
    [folder] = entries(own_cache)
    victim = folder / {"shard": "train-00000.bin", "starts": "starts.bin", "absent": "train-00000.bin"}.get(
        damage, "meta.json"
    )
    if damage in ("no meta", "absent"):
        victim.unlink()
    elif damage == "format":
        victim.write_text(json.dumps({**json.loads(victim.read_text()), "format": 0}))
    else:
        victim.write_bytes(victim.read_bytes()[:-3])
    again = load(path)
    assert (again.sha256, whole(again.train)) == (first.sha256, whole(first.train))
    assert entries(own_cache) == [folder]


def test_what_a_killed_build_left_is_deleted_and_what_a_living_one_writes_is_not(
    tmp_path: Path, own_cache: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    load(path)
    [folder] = entries(own_cache)
    for name in (folder.name, "0" * 32, "spool-1"):
        (own_cache / f"{name}.1-ab.partial").mkdir()
        (own_cache / f"{name}.1-ab.partial" / "train-00000.bin").write_bytes(b"x")
    living = own_cache / f"{'1' * 32}.1-ab.partial"
    living.mkdir()
    with lock(own_cache / f"{'1' * 32}.lock"):
        (folder / "meta.json").unlink()
        load(path)
        assert entries(own_cache) == sorted([folder, living])


def test_a_killed_build_leaves_nothing_that_is_trusted(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun = tmp_path / "a.txt", tmp_path / "begun"
    path.write_bytes(TEXT)
    code = f"""
import pathlib, sys
from gateloop_transformer.data import corpus
from gateloop_transformer.data.tokenizer import ByteTokenizer
def slow(*arguments):
    pathlib.Path({str(begun)!r}).touch()
    sys.stdin.read()
corpus.join_starts = slow
corpus.load_corpus({str(path)!r}, valid_fraction=0.1, context=8, tokenizer=ByteTokenizer())
"""
    process = processes.start([sys.executable, "-c", code], stdin=PIPE)
    processes.until(begun.exists, process)
    [partial] = entries(own_cache)
    assert partial.suffix == ".partial"
    asked, lock = threading.Event(), fcntl.flock

    def ask(descriptor: int, how: int) -> None:
        asked.set()
        lock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", ask)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(load, path)
        try:
            assert asked.wait(processes.LIMIT)
            assert not waiting.done()
            assert entries(own_cache) == [partial]
        finally:
            process.kill()
        assert len(waiting.result().train) == round(len(TEXT) * 0.9)
    assert [entry.suffix for entry in entries(own_cache)] == [""]


def test_processes_that_start_together_make_one_corpus(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _n: load(path).sha256, range(8)))
    assert len(set(found)) == len(entries(own_cache)) == 1


def test_without_locks_one_of_several_builds_is_kept(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: int, _how: int) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    test_processes_that_start_together_make_one_corpus(tmp_path, own_cache)


def test_standard_input_is_found_again_by_its_hash(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([f"text {n}" for n in range(100)]))
    for packed in (path.read_bytes(), gzip.compress(path.read_bytes(), mtime=0)):
        give(monkeypatch, packed)
        assert load("-", field="text").sha256 == load(path).sha256
    give(monkeypatch, TEXT)
    found = load("-")
    assert "standard input: 1 file, the end held out" in found.description
    give(monkeypatch, b"")
    assert load("-", sha256=found.sha256).sha256 == found.sha256
    assert whole(load("-", sha256=found.sha256).valid) == whole(found.valid)
    [kept] = [
        path for path in entries(own_cache) if json.loads((path / "meta.json").read_text())["sha256"] == found.sha256
    ]
    os.rename(kept, own_cache / "building.1-ab.partial")
    with pytest.raises(ValueError, match="is no longer in the cache"):
        load("-", sha256=found.sha256)
    os.rename(own_cache / "building.1-ab.partial", kept)
    assert not [entry for entry in own_cache.iterdir() if "spool" in entry.name]
    with pytest.raises(ValueError, match="is no longer in the cache: give it on standard input again"):
        load("-", sha256="0" * 64)
    with pytest.raises(ValueError, match="standard input is empty"):
        load("-")
    give(monkeypatch, lines(["a", 3]))
    with pytest.raises(ValueError, match="standard input, line 2: the field 'text' must be a text"):
        load("-", field="text")
    assert not [entry for entry in own_cache.iterdir() if entry.suffix == ".partial"]


def test_a_dataset_of_the_hub_is_found_again_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str, _config: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    (tmp_path / "a.txt").write_bytes(TEXT)
    sha256 = load(tmp_path / "a.txt").sha256
    found = load("hf:no/where", sha256=sha256)
    assert found.sha256 == sha256
    assert found.description.startswith("'hf:no/where': ")
    for other in (None, "0" * 64):
        with pytest.raises(ValueError, match="cannot load 'hf:no/where': no network"):
            load("hf:no/where", sha256=other)


def test_data_that_is_too_short_or_cannot_be_read_is_refused(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="too short: 4 training and 1 validation bytes; a context of 64 needs"):
        load(tmp_path / "a.txt", context=64)
    (tmp_path / "b.gz").write_bytes(gzip.compress(TEXT)[:-9])
    with pytest.raises(ValueError, match="cannot decompress"):
        load(tmp_path / "b.gz")
    assert len(entries(own_cache)) == 1


def test_the_cache_is_not_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert load(tmp_path).sha256 == load(tmp_path).sha256
    assert len(load(tmp_path).train) == round(len(TEXT) * 0.9)


def test_a_cache_that_cannot_be_made_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    monkeypatch.setenv("GATELOOP_CACHE", str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=r"the data's cache: cannot make the folder .*; set GATELOOP_CACHE"):
        load(tmp_path / "a.txt")


def test_without_a_home_the_cache_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("GATELOOP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ValueError, match=r"there is no home folder .*: set GATELOOP_CACHE to a folder"):
        cache_folder()


@pytest.mark.parametrize("where", ["nowhere", "damaged"])
def test_a_linked_corpus_that_is_damaged_is_made_again_and_what_it_leads_to_is_kept(
    tmp_path: Path, own_cache: Path, where: str
) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    first = load(tmp_path / "a.txt")
    [folder] = entries(own_cache)
    disk = tmp_path / "disk"
    folder.rename(disk)
    (disk / "meta.json").write_text("{")
    folder.symlink_to(disk if where == "damaged" else tmp_path / "absent")
    assert load(tmp_path / "a.txt").sha256 == first.sha256
    assert not folder.is_symlink()
    assert (disk / "meta.json").read_text() == "{"
    assert not list((own_cache / "corpora").glob("*.partial"))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["GATELOOP_CACHE"])
    monkeypatch.delenv("GATELOOP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/gateloop")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "gateloop"


def test_tokens_outside_are_refused() -> None:
    tokens = Tokens.of(np.arange(10), [0, 4, 7])
    assert tokens.starts(4, 7).tolist() == [4]
    for start, stop in ((-1, 3), (3, 11), (4, 3)):
        with pytest.raises(IndexError, match="not within the 10"):
            tokens.read(start, stop)


@pytest.mark.slow
def test_memory_is_bounded_however_large_the_corpus(tmp_path: Path) -> None:
    """600 MB: building and then reading at random take less than 100 MB more than nothing at all."""
    line = bytes(range(32, 127)) + b"\n"
    with (tmp_path / "large.txt").open("wb") as file:
        for _ in range(600):
            file.write(line * (1_000_000 // len(line)))
    code = f"""
import resource
from gateloop_transformer.data.batches import batch_at
from gateloop_transformer.data.corpus import load_corpus
from gateloop_transformer.data.tokenizer import ByteTokenizer
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = load_corpus({str(tmp_path / "large.txt")!r}, valid_fraction=0.1, context=512, tokenizer=ByteTokenizer())
for step in range(2000):
    batch_at(corpus.train, step + 1, windows=16, context=512, seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(processes.python("-c", code)) < 100_000
