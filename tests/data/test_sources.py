"""Documents out of every kind of source, and every refusal."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import give, lines

from gateloop_transformer.data import files, records
from gateloop_transformer.data.sources import absolute, open_source, standard_library

TEXTS = ["first\n", "zwölf\n" * 3, "third"]


def pack_zst(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": pack_zst}


def read_all(source: str | None, **options: Any) -> tuple[list[tuple[str, bytes]], int]:
    opened = open_source(source, **options)
    documents = [(document.name, b"".join(document.blocks)) for document in opened.documents()]
    return documents, opened.left_out


def write_parquet(path: Path, texts: list[Any], field: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), path, row_group_size=2)


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_is_read_in_blocks_however_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(files, "BLOCK", 1000)
    content = os.urandom(2500).replace(b"\0", b"x")
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](content))
    [document] = open_source(str(path)).documents()
    parts = list(document.blocks)
    assert b"".join(parts) == content
    assert max(map(len, parts)) <= 1000


def test_compressed_parts_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    for suffix, pack in PACK.items():
        path = tmp_path / f"a{suffix}"
        path.write_bytes(pack(b"one ") + pack(b"two"))
        assert read_all(str(path))[0] == [(".", b"one two")]


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_are_a_document_each(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](lines(TEXTS) + b"\n" + lines(["", None])))
    documents, left_out = read_all(str(path))
    assert documents == [(f".#{n}", text.encode()) for n, text in enumerate(TEXTS)]
    assert left_out == 2


def test_parquet_rows_are_a_document_each(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [*TEXTS, None, "", "last"], "body")
    documents, left_out = read_all(str(tmp_path / "a.parquet"), field="body")
    assert [text for _, text in documents] == [*(text.encode() for text in TEXTS), b"last"]
    assert documents[-1][0] == ".#5"
    assert left_out == 2


@pytest.mark.parametrize("kind", ["saved", "saved splits", "files"])
def test_datasets_of_hugging_face_are_read_from_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    import datasets

    folder = tmp_path / "data"
    rows = datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": [1, 2, 3, 4]})
    if kind == "saved":
        rows.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(folder)
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_bytes(lines([*TEXTS, None]))
        (folder / "test.jsonl").write_bytes(lines(TEXTS[:1]))
    documents, left_out = read_all(f"hf:{folder}")
    assert documents == [(f".#{n}", text.encode()) for n, text in enumerate(TEXTS)]
    assert left_out == 1
    if kind != "saved":
        assert [text for _, text in read_all(f"hf:{folder}:test")[0]] == [TEXTS[0].encode()]
        with pytest.raises(ValueError, match="has no split 'dev'; it has "):
            read_all(f"hf:{folder}:dev")
    with pytest.raises(ValueError, match=r"no field 'body' .*'text'"):
        read_all(f"hf:{folder}", field="body")
    first = open_source(f"hf:{folder}").identity()
    assert first == open_source(f"hf:{folder}").identity()
    (folder / "more.jsonl").write_bytes(lines(["new"]))
    assert first != open_source(f"hf:{folder}").identity()


def test_a_dataset_that_is_nowhere_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str, _config: str | None) -> None:
        raise ConnectionError("Couldn't reach 'no/where' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    with pytest.raises(ValueError, match=r"cannot load 'hf:no/where,en:train': Couldn't reach .*Hub$"):
        read_all("hf:no/where,en:train")
    with pytest.raises(ValueError, match="names no dataset"):
        read_all("hf:")


@pytest.mark.parametrize("suffix", PACK)
def test_standard_input_is_a_text_or_json_lines(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    give(monkeypatch, PACK[suffix](lines(TEXTS)))
    assert read_all("-") == ([(".", lines(TEXTS))], 0)
    give(monkeypatch, PACK[suffix](lines(TEXTS)))
    assert [text for _, text in read_all("-", field="text")[0]] == [text.encode() for text in TEXTS]


def test_a_folder_is_read_in_a_fixed_order_without_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.jsonl").write_bytes(lines(["c", "d"]))
    (tmp_path / "b.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics").write_text("excluded")
    os.mkfifo(tmp_path / "pipe")
    documents, left_out = read_all(str(tmp_path), exclude=[tmp_path / "run"])
    assert documents == [("a.txt", b"a"), ("c.jsonl#0", b"c"), ("c.jsonl#1", b"d"), ("sub/b.txt", b"b")]
    assert left_out == 2
    with pytest.raises(ValueError, match="regular file"):
        open_source(str(tmp_path / "pipe"))
    assert [name for name, _ in read_all(str(tmp_path / "**" / "*.txt"))[0]] == ["a.txt", "sub/b.txt"]


def test_the_standard_library_is_text_without_tests() -> None:
    source = standard_library()
    names = {path.relative_to(source.root).as_posix() for path in source.paths}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(name.startswith("test/") for name in names)


def test_padding_and_further_frames_are_read(tmp_path: Path) -> None:
    path, text = tmp_path / "a.xz", b"a text" * 5000
    frame = lzma.compress(text)
    # Longer than what is unpacked at a time, so that padding is met in parts.
    path.write_bytes(frame + b"\0" * 40_000 + frame + frame + b"\0" * 4)
    with files.open_file(path) as file:
        assert file.read() == 3 * text
    path = tmp_path / "a.gz"
    path.write_bytes(2 * gzip.compress(text, mtime=0) + b"\0" * 7)
    with files.open_file(path) as file:
        assert file.read() == 2 * text
    path = tmp_path / "a.zst"
    path.write_bytes(2 * pack_zst(text))
    with files.open_file(path) as file:
        assert file.read() == 2 * text


def test_names_that_are_no_text_are_names(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / os.fsdecode(b"\xff.parquet")
    with path.open("wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), file)
    assert [b"".join(document.blocks) for document in open_source(str(tmp_path)).documents()] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "a.txt", "no file, folder or glob match"),
        (b"", "a.txt", "is empty"),
        (b"\0" * 50, "a.txt", "holds no text, only binary data"),
        (b"not gzip", "a.gz", "cannot decompress"),
        (gzip.compress(b"text" * 99, mtime=0)[:-9], "a.gz", "cannot decompress"),
        (b"not xz", "a.xz", "cannot decompress"),
        (lzma.compress(b"text" * 99)[:-9], "a.xz", "cannot decompress"),
        (lzma.compress(b"text" * 99) + b"\0" * 3, "a.xz", "cannot decompress.*3 zeros follow a stream"),
        (lzma.compress(b"text" * 99) + b"\0" * 8 + b"junk", "a.xz", "cannot decompress"),
        (b"\0" * 4 + lzma.compress(b"text" * 99), "a.xz", "cannot decompress"),
        (gzip.compress(b"text" * 99, mtime=0) + b"junk", "a.gz", "cannot decompress"),
        (pack_zst(b"text" * 99) + b"junk", "a.zst", "cannot decompress"),
        (b"not zst", "a.zst", "cannot decompress"),
        (pack_zst(b"text" * 99)[:-9], "a.zst", "cannot decompress.*ends within a frame"),
        (b'{"text": "a"}\n{"body": "b"}\n', "a.jsonl", r"line 2 has no field 'text' \(--field names another: 'body'\)"),
        (b'{"text": "a"}\n\n{"text": \n', "a.jsonl", "line 3 is not JSON"),
        (b'{"text": "\xff"}\n', "a.jsonl", "line 1 is not UTF-8"),
        (b'{"text": "a"}\n{"text": 3}\n', "a.jsonl", "line 2: the field 'text' must be a text, not a number"),
        (b'["a"]\n', "a.jsonl", "line 1 must be a JSON object with the field 'text', not a list"),
        (b'{"text": ""}\n', "a.jsonl", "is empty"),
        (b"[" * 100_000, "a.jsonl", "line 1 is not JSON"),
        (
            b'{"text": "a"}\n{"text": "b", "n": ' + b"1" * 5000 + b"}",
            "a.jsonl",
            "line 2 is not JSON: it has a number of",
        ),
        (gzip.compress(lines(["text"] * 99), mtime=0)[:-9], "a.jsonl.gz", "cannot decompress"),
        (b"PAR1 no", "a.parquet", "cannot read"),
        (b"", "a.parquet.gz", "Parquet compresses by itself"),
    ],
)
def test_what_cannot_be_read_is_one_error(tmp_path: Path, content: bytes | None, name: str, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_all(str(path))
    assert len(str(error.value).splitlines()) == 1


def test_damage_behind_the_first_block_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 1000)
    for suffix, pack in list(PACK.items())[1:]:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(pack(os.urandom(1 << 18).replace(b"\0", b"x"))[:-2000])
        with pytest.raises(ValueError, match="cannot decompress"):
            read_all(str(path))


def test_columns_of_parquet_files_are_checked(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(ValueError, match="row 1: the field 'text' must be a text, not a number"):
        read_all(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"no field 'body' .*'id', 'text'"):
        read_all(str(tmp_path / "a.parquet"), field="body")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(lines(["short", "x" * 200]))
    with pytest.raises(ValueError, match="line 2 is longer than"):
        read_all(str(tmp_path / "a.jsonl"))


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    assert read_all(str(tmp_path / "a.jsonl"))[0][0][1] == b"a\xed\xa0\x80b"


@pytest.mark.parametrize("module", ["zstandard", "pyarrow", "datasets"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    source = {"zstandard": "a.zst", "pyarrow": "a.parquet"}.get(module)
    if source is not None:
        (tmp_path / source).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"package {module}: `pip install gateloop-transformer\[data\]`"):
        read_all("hf:any" if source is None else str(tmp_path / source))


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("text")
    with pytest.raises(ValueError, match="holds no files"):
        open_source(str(tmp_path))


def test_sources_mean_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    assert absolute("a.txt") == str(tmp_path / "a.txt")
    assert absolute("hf:set:test") == f"hf:{tmp_path / 'set'}:test"
    for same in (None, "", "-", "hf:owner/name,config:split", str(tmp_path)):
        assert absolute(same) == same


def test_the_folders_of_runs_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "config.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    assert read_all(str(tmp_path))[0] == [("a.txt", b"text")]


def test_a_field_of_whole_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"--field body: .* holds no records"):
        open_source(str(tmp_path / "a.txt"), field="body")
