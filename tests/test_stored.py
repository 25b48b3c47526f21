"""Files of text and JSON, the same in every locale; what of them cannot be read is named."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gateloop_transformer.stored import DamageError, as_text, parse_json, read_json, read_tensors, write_tensors

ROOT = Path(__file__).parents[1]
# Without an encoding these take that of the locale: what opens a file, and what starts a process.
OPEN, START = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}, {"run", "Popen"}
# Whose open is that of bytes or of no file.
OTHERS = {"os", "gzip", "lzma"}
# Files that run where this package is not.
ALONE = {"numpy_runtime.py", "peer_server.py"}


def calls(*folders: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Where a call is, the last part of the name of what is called, and the call."""
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name, node


def is_text(name: str, call: ast.Call) -> bool:
    """Whether a call is of a file or a process that is read or written as text, as far as its arguments say."""
    options = {keyword.arg for keyword in call.keywords}
    if name in START:
        return "text" in options or "universal_newlines" in options
    of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else None
    if name not in OPEN or of in OTHERS or (of is None and name != "open"):
        return False
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return not any(isinstance(each, ast.Constant) and each.value in ("rb", "wb", "ab", "r+b", "w+b") for each in values)


def test_every_text_names_its_encoding() -> None:
    found = [
        f"{place}: {name}"
        for place, name, call in calls("gateloop_transformer", "examples", "benchmarks")
        if is_text(name, call) and not any(keyword.arg == "encoding" for keyword in call.keywords)
    ]
    assert found == []


def test_json_is_read_in_one_place() -> None:
    found = [
        place
        for place, name, call in calls("gateloop_transformer")
        if name in ("load", "loads") and ast.unparse(call.func).startswith("json.")
    ]
    assert {Path(place.split(":")[0]).name for place in found} == {"stored.py", *ALONE}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 100_000, "is not JSON: it is nested too deeply"),
        ('{"a": ' * 100_000, "is not JSON: it is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON: it has a number of more than 4,300 digits"),
        ('{"a": ', "is not JSON: Expecting value: line 1 column 7"),
        (b'{"a": "\xff"}', "is not UTF-8: invalid start byte at byte 7"),
        ("", "is not JSON: Expecting value"),
    ],
)
def test_what_is_no_json_is_named(content: str | bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=rf"^line 7 {problem}"):
        parse_json(content, "line 7")
    path = tmp_path / "a.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DamageError, match=rf"a\.json' {problem}"):
        read_json(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=r"absent\.json' is missing$"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(DamageError, match=f"cannot read '{tmp_path}': Is a directory$"):
        read_json(tmp_path)


def test_names_that_are_no_text_are_shown() -> None:
    assert as_text("a\udcff\ud800ö") == "a\ufffd\ufffdö"


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


def test_files_of_tensors_are_as_readable_as_others_and_may_have_any_name(tmp_path: Path) -> None:
    path, other = tmp_path / os.fsdecode(b"\xff.safetensors"), tmp_path / "other"
    other.touch()
    for metadata in (None, {"format": "pt"}):
        write_tensors(path, {"a": torch.ones(2)}, metadata)
        assert path.stat().st_mode == other.stat().st_mode
        assert read_tensors(path)[0]["a"].tolist() == [1, 1]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_tensors(tmp_path / "folder", {"a": torch.ones(2)})
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "absent" / "a", {"a": torch.ones(2)})
    assert len(list(tmp_path.iterdir())) == 3
