"""The page: whole in itself, the text given back to the byte, small, and safe whatever the text is."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from gateloop_transformer import Transformer
from gateloop_transformer.data.bpe import train_tokenizer
from gateloop_transformer.data.tokenizer import ByteTokenizer, Tokenizer
from gateloop_transformer.inspection.measures import half_lives, phases
from gateloop_transformer.inspection.page import half_life_codes, page, text_of
from gateloop_transformer.inspection.report import Report, report
from gateloop_transformer.inspection.trace import LayerGates, Trace, trace

TEXT = 'Grüße “π” \u2028 日本\u202e עברית\r\n\t</script><!-- <b>&amp; "x"\x00\x1b '.encode() + b"\xff\xe2\x82 end\n"


class Reader(HTMLParser):
    """Elements that are opened and closed in order, and what is in them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.key = ""
        self.texts: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
            self.key = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.key] = self.texts.get(self.key, "") + data


def read(content: str) -> tuple[Reader, dict[str, Any]]:
    reader = Reader(content)
    assert not reader.open
    return reader, json.loads(reader.texts["data"], parse_constant=pytest.fail)


def made(tokenizer: Tokenizer, text: bytes = TEXT, **options: Any) -> Report:
    torch.manual_seed(0)
    options = {"layer_pattern": "gate attention", "gate_loop_heads": 4, "heads": 2, "dim_head": 8, **options}
    model = Transformer(16, num_tokens=tokenizer.size, depth=2, **options)
    return report(trace(model, tokenizer.encode(text)), tokenizer)


def tokenizers() -> list[Tokenizer]:
    return [ByteTokenizer(), train_tokenizer([[TEXT * 3]], 280)]


def bytes_of(values: dict[str, Any]) -> bytes:
    return b"".join(
        bytes.fromhex(text[0]) if isinstance(text, list) else text.encode("utf-8") for text in values["text"]
    )


def test_the_page_is_whole_in_itself_and_gives_the_text_back() -> None:
    for tokenizer in tokenizers():
        content = page(made(tokenizer), "<b>run</b> & more", ["a <note>"])
        reader, values = read(content)
        assert bytes_of(values) == TEXT
        assert "http:" not in content
        assert "https:" not in content
        assert not [each for each in reader.attributes if each[1] in ("src", "href")]
        assert not any(word in content for word in ("@import", "url(", "fetch(", "XMLHttp", "innerHTML"))
        assert reader.texts["title"].strip() == reader.texts["h1"].strip() == "<b>run</b> & more"
        assert (values["title"], values["notes"]) == ("<b>run</b> & more", ["a <note>"])
        assert all(ord(character) < 128 and character not in "<>&" for character in reader.texts["data"])
        for name in ("page", "TITLE", "STYLE", "FIGURES", "SCRIPT", "DATA"):
            assert f"{name}-->" not in content
            assert f"{name}*/" not in content


def test_tokens_that_are_text_only_together_are_said_so() -> None:
    found = text_of([b"a", b" \xe2\x82", b"\xac", b"\xff", b"\xe2", b"\n", b"\xc3", b"\xbc"])
    assert found["text"] == ["a", ["20 E2 82"], ["AC"], ["FF"], ["E2"], "\n", ["C3"], ["BC"]]
    assert found["joined"] == [(1, 2, " €"), (6, 7, "ü")]


def test_gates_on_the_page_are_those_of_the_model() -> None:
    found = made(ByteTokenizer())
    values = read(page(found, "x", []))[1]
    gates = found.trace.layers[0].gates
    assert gates is not None
    layer, (low, high) = values["layers"][0], values["scale"]
    shown, T = np.array(layer["shown"]) - 1, len(TEXT)
    assert sorted(shown.tolist()) == [0, 1, 2, 3]
    codes = np.frombuffer(base64.b64decode(layer["life"]), "<u2").reshape(4, T)
    lives = 2.0 ** (low + codes / 65534 * (high - low))
    np.testing.assert_allclose(lives, half_lives(gates[:, shown]).T, rtol=1e-3)
    turns = np.frombuffer(base64.b64decode(layer["phase"]), "u1").reshape(4, T)
    away = np.angle(np.exp(1j * (turns / 256 * 2 * np.pi - np.pi - phases(gates[:, shown]).T)))
    assert np.abs(away).max() <= np.pi / 256 + 1e-9
    middle = np.frombuffer(base64.b64decode(layer["quantiles"]), "<u2").reshape(5, T)[2]
    assert (middle[:, None] == codes.T).any(1).all()
    assert values["layers"][1] == found.figures["layers"][1]
    assert (values["nats"][0], values["right"][0]) == (None, 0)


def test_infinite_half_lives_are_written_as_such() -> None:
    content = page(made(ByteTokenizer(), ablate_state_transition=True), "x", [])
    values = read(content)[1]
    assert values["layers"][0]["half_life"]["50%"] == "∞"
    assert set(np.frombuffer(base64.b64decode(values["layers"][0]["life"]), "<u2").tolist()) == {65535}
    assert half_life_codes(np.array([2.0**-8, 2.0**56, np.inf])).tolist() == [0, 65534, 65535]
    assert "NaN" not in read(content)[0].texts["data"]
    assert "Infinity" not in read(content)[0].texts["data"]


@pytest.mark.parametrize(("T", "layers", "heads"), [(4000, 4, 64), (512, 14, 768)])
def test_a_page_stays_small_and_says_how_many_heads_it_shows(T: int, layers: int, heads: int) -> None:
    random = np.random.default_rng(0)
    gates = random.uniform(0.5, 1, (T, heads)) * np.exp(1j * random.uniform(-3, 3, (T, heads)))
    ids = random.integers(32, 127, T)
    found = Trace(ids, [LayerGates(n + 1, "x", gates, "") for n in range(layers)], np.ones(T), np.ones(T, bool))
    content = page(report(found, ByteTokenizer()), "x", [])
    assert len(content) < 5_000_000
    layer = read(content)[1]["layers"][0]
    assert 2 <= len(layer["shown"]) < layer["heads"] == heads
    assert len(base64.b64decode(layer["life"])) == 2 * T * len(layer["shown"])


def test_more_tokens_than_a_page_shows_are_refused() -> None:
    ids = np.zeros(4001, dtype=np.int64)
    found = report(Trace(ids, [], np.ones(4001), np.ones(4001, bool)), ByteTokenizer())
    with pytest.raises(ValueError, match="at most 4,000 tokens, not 4,001"):
        page(found, "x", [])
