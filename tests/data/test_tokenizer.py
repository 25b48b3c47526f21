"""Tokens of bytes and of byte-level BPE: nothing is lost, wherever a text is cut."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateloop_transformer.cli import main
from gateloop_transformer.data import bpe
from gateloop_transformer.data.bpe import BPETokenizer, cut_text, load_tokenizer_file, train_tokenizer
from gateloop_transformer.data.tokenizer import ByteTokenizer, encode_blocks, encode_document

TEXT = "".join(f"{n} times {n} is {n * n}, so ünd so;\n\n  and\n\nthen \n“{n}” 東京.\n" for n in range(200)).encode()


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_tokenizer([[TEXT]], 400)


def changed(tokenizer: BPETokenizer, **changes: Any) -> bytes:
    return json.dumps({**json.loads(tokenizer._content), **changes}).encode()


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(b"a\xff\0").tolist() == [97, 255, 0]
    assert tokenizer.decode([97, 255, 0]) == b"a\xff\0"
    assert (tokenizer.size, tokenizer.end, tokenizer.dtype, len(tokenizer.pieces)) == (256, None, np.uint8, 256)
    assert [ids.tolist() for ids in encode_document(tokenizer, [b"ab", b"c"])] == [[97, 98], [99]]


def test_training_joins_what_is_frequent_and_is_deterministic(tokenizer: BPETokenizer) -> None:
    assert tokenizer.size == 400
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT)
    assert train_tokenizer([[TEXT[:1000], TEXT[1000:]]], 400).sha256 == tokenizer.sha256
    assert train_tokenizer([[TEXT[:1000]]], 400).sha256 != tokenizer.sha256
    assert train_tokenizer([[b"aa"]], 1000).size < 260


@pytest.mark.parametrize("size", [0, 256, 2**33])
def test_a_vocabulary_holds_all_bytes_and_the_end(size: int) -> None:
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer([[TEXT]], size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        TEXT,
        bytes(range(256)) * 3,
        b"\xff",
        "ü".encode()[:1] + b"x",
        b"a<|endoftext|>b",
        b"\xed\xa0\x80",
        b"\xef\xbf\xbd",
    ],
    ids=["empty", "text", "all bytes", "no text", "half a character", "the name of the end", "surrogate", "U+FFFD"],
)
def test_every_content_comes_back(tokenizer: BPETokenizer, content: bytes) -> None:
    ids = tokenizer.encode(content)
    assert ids.dtype == tokenizer.dtype == np.dtype("<u2")
    assert tokenizer.decode(ids) == content
    assert tokenizer.end not in ids
    assert tokenizer.lengths[ids].sum() == len(content)
    *parts, end = encode_document(tokenizer, [content])
    assert np.concatenate([ids[:0], *parts]).tolist() == ids.tolist()
    assert end.tolist() == [tokenizer.end]


def test_random_bytes_come_back(tokenizer: BPETokenizer) -> None:
    rng = random.Random(0)
    for _ in range(50):
        content = bytes(rng.choices(b"\n a1\xc3\xbc\xe6\x9d\xb1\xff\x80", k=rng.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(content)) == content


def test_pieces_do_not_depend_on_blocks_and_are_encoded_as_the_whole(
    tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.array(tokenizer._tokenizer.encode(TEXT.decode(), add_special_tokens=False).ids)
    monkeypatch.setattr(bpe, "PIECE", 100)
    monkeypatch.setattr(bpe, "LONGEST_PIECE", 1000)
    pieces = list(tokenizer.cut([TEXT]))
    assert len(pieces) > 20
    assert b"".join(pieces) == TEXT
    for size in (1, 7, 99, 5000):
        blocks = [TEXT[n : n + size] for n in range(0, len(TEXT), size)]
        assert list(tokenizer.cut(blocks)) == pieces
        assert np.concatenate(list(encode_blocks(tokenizer, blocks))).tolist() == whole.tolist()


def test_a_stretch_without_line_breaks_is_cut_between_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "PIECE", 10)
    monkeypatch.setattr(bpe, "LONGEST_PIECE", 50)
    content = "東京".encode() * 100
    pieces = list(cut_text(content[n : n + 7] for n in range(0, len(content), 7)))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) == 48
    assert all(piece.decode() for piece in pieces)
    assert max(map(len, cut_text([b"\x80" * 500]))) <= 50


def test_a_file_gives_the_tokenizer_back(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer_file(tmp_path / "tokenizer.json")
    assert (again.sha256, again.size, again.end) == (tokenizer.sha256, tokenizer.size, tokenizer.end)
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_file_that_shortens_or_fills_up_texts_does_neither(tokenizer: BPETokenizer) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    fill |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    other = BPETokenizer(changed(tokenizer, truncation=cut, padding=fill), "it")
    assert [other.encode(text).tolist() for text in (TEXT, b"a")] == [
        tokenizer.encode(text).tolist() for text in (TEXT, b"a")
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "its normalizer changes texts"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it is not byte-level"),
        ({"pre_tokenizer": None}, "it is not byte-level"),
        ({"added_tokens": []}, "it has no special token <|endoftext|>"),
        ("prefix space", "it puts a space before texts"),
        ("removed", "removes parts of texts"),
        ("word piece", "its model is WordPiece, not BPE"),
        ("dropout", "its dropout draws tokens"),
        ("no byte", "no token stands for the byte 33"),
        ("far", "tokens, numbered up to 2,147,483,648"),
    ],
)
def test_other_tokenizers_are_refused_with_a_reason(tokenizer: BPETokenizer, change: Any, reason: str) -> None:
    values = json.loads(tokenizer._content)
    level = values["pre_tokenizer"]
    changes: dict[Any, dict[str, Any]] = {
        "prefix space": {"pre_tokenizer": {**level, "add_prefix_space": True}},
        "removed": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, level]}},
        "word piece": {
            "model": {
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {"[UNK]": 0, "<|endoftext|>": 1},
            }
        },
        "dropout": {"model": {**values["model"], "dropout": 0.1}},
        "far": {"model": {**values["model"], "vocab": {**values["model"]["vocab"], "abcdefgh": 2**31}}},
        "no byte": {
            "model": {
                **values["model"],
                "vocab": {token: n for token, n in values["model"]["vocab"].items() if token != "!"},
                "merges": [pair for pair in values["model"]["merges"] if "!" not in "".join(pair)],
            }
        },
    }
    with pytest.raises(ValueError, match="cannot be used") as error:
        BPETokenizer(changed(tokenizer, **(changes[change] if isinstance(change, str) else change)), "'it'")
    assert reason in str(error.value)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for content in (b"{}", b"no json", b"[1]", b"\xff"):
        with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
            BPETokenizer(content, "'it'")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        load_tokenizer_file(tmp_path / "absent")


def test_the_command_makes_a_file_that_transformers_could_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tokenizers

    data, out = tmp_path / "a.jsonl", tmp_path / "tokenizer.json"
    data.write_text("".join(json.dumps({"body": f"{n} times {n} is {n * n}\n"}) + "\n" for n in range(500)))
    command = ["tokenizer", "train", str(data), "--field", "body", "--vocab-size", "300", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 300
    assert said["bytes_per_token"] > 1.5
    plain = tokenizers.Tokenizer.from_file(str(out))
    assert plain.decode(plain.encode("7 times 7 is 49").ids) == "7 times 7 is 49"
    assert plain.token_to_id("<|endoftext|>") == load_tokenizer_file(out).end
    before = out.read_bytes()
    assert main(command) == 2
    assert "already exists: replace it with --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--limit-bytes", "1000"]) == 0
    assert "300 tokens from 1,000 bytes, " in capsys.readouterr().out
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "10"], "at least 257"),
        (["--vocab-size", "300", "--limit-bytes", "0"], "--limit-bytes must be at least 1"),
        (["--vocab-size", "300", "--field", "body"], "line 1 has no field 'body'"),
        (["--vocab-size", "300", "--out", "FOLDER"], "is a folder, not a file"),
    ],
)
def test_wrong_flags_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a text"}\n')
    given = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    assert main(["tokenizer", "train", str(data), "--out", str(tmp_path / "t.json"), *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "t.json").exists()
