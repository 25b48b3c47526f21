"""Half-lives, classes of characters and spectra: against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateloop_transformer.inspection.characters import CLASSES, classes_of
from gateloop_transformer.inspection.measures import (
    CELLS,
    by_class,
    decays,
    half_lives,
    heads_by_half_life,
    histogram_of_half_lives,
    phases,
    quantiles,
    some_of,
    spectrum,
)


def random_gates(*shape: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.uniform(0, 1, shape) * np.exp(1j * random.uniform(-np.pi, np.pi, shape))


def test_after_a_half_life_half_is_left() -> None:
    gates = random_gates(50)
    np.testing.assert_allclose(np.abs(gates) ** half_lives(gates), 0.5)
    assert half_lives(np.array([1, -1, 1j, 1 + 1e-9])).tolist() == [math.inf] * 4
    assert 0 < half_lives(np.array([0j]))[0] < 0.01
    assert np.isfinite(decays(np.array([0j, 1, 1e-300]))).all()


def test_phases_of_real_gates_are_0_or_pi() -> None:
    real = np.array([complex(0.5, 0.0), complex(-0.5, 0.0), complex(-0.5, -0.0), complex(0.5, -0.0)])
    assert phases(real).tolist() == [0.0, math.pi, math.pi, 0.0]
    assert phases(np.array([1j, -1j])).tolist() == [math.pi / 2, -math.pi / 2]


def test_quantiles_are_values_that_there_are() -> None:
    values = np.array([1.0, 2.0, 3.0, math.inf, math.inf])
    assert quantiles(values).tolist() == [1.0, 2.0, 3.0, math.inf, math.inf]


def test_classes_are_those_of_the_characters() -> None:
    text = "Ab 1,\n\n  é!\tnaïve\u2028x\u0301".encode()
    pieces = [text[n : n + 1] for n in range(len(text))]
    found = classes_of(pieces)

    def held(name: str) -> bytes:
        return bytes(byte for byte, own in zip(text, found[name], strict=True) if own)

    assert held("newline") == "\n\n\u2028".encode()
    assert held("first of a line") == b"A x"
    assert held("space") == b"   \t"
    assert held("first of a word") == "Aénx".encode()
    assert held("letter") == "Abénaïvex\u0301".encode()
    assert held("digit") == b"1"
    assert held("punctuation") == b",!"
    assert "other" not in found
    alone = ("newline", "space", "letter", "digit", "punctuation")
    assert (sum(found[name].astype(int) for name in alone) == 1).all()


def test_tokens_of_several_characters_are_in_all_their_classes() -> None:
    found = classes_of([b"a\n", b"", b" b1", b"\xff\x00"])
    assert {name: found[name].tolist() for name in ("newline", "space", "digit", "other")} == {
        "newline": [True, False, False, False],
        "space": [False, False, True, False],
        "digit": [False, False, True, False],
        "other": [False, False, False, True],
    }
    assert found["first of a line"].tolist() == [True, False, True, False]
    assert set(found) <= set(CLASSES)
    assert classes_of([]) == {}


def test_where_memory_fades_is_a_mean_over_tokens_and_heads() -> None:
    gates = np.full((4, 2), 0.5 + 0j)
    gates[1] = 0.25
    own = np.array([False, True, False, False])
    found = by_class(gates, {"space": own, "letter": ~own})
    assert found["space"].ratio == pytest.approx(2 / 1.25)
    assert found["letter"].ratio == pytest.approx(1 / 1.25)
    assert (found["space"].tokens, found["space"].half_life) == (1, 0.5)
    assert found["space"].decay == pytest.approx(math.log(4))
    still = by_class(np.ones((4, 2), complex), {"space": own})["space"]
    assert still.to_json() == {"tokens": 1, "half_life": "∞", "decay": 0.0, "ratio": None}


def test_histograms_hold_every_gate_once() -> None:
    gates = random_gates(30, 4)
    gates[:3] = 1
    gates[3] = 0
    rows = histogram_of_half_lives(gates)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[-1] == {"from": "∞", "to": "∞", "share": pytest.approx(0.1)}
    assert [row["from"] for row in rows[1:-1]] == [row["to"] for row in rows[:-2]]
    assert histogram_of_half_lives(np.ones((2, 2), complex)) == [{"from": "∞", "to": "∞", "share": 1.0}]
    counts = spectrum(gates)
    assert counts.sum() == gates.size
    assert counts[CELLS // 2, CELLS - 1] >= 12
    assert spectrum(np.array([[-0.99 + 0.01j]]))[CELLS // 2, 0] == 1


def test_heads_are_put_in_order_and_some_are_taken_evenly() -> None:
    gates = np.array([[0.9, 0.1, 1.0, 0.5]] * 3)
    assert heads_by_half_life(gates).tolist() == [1, 3, 0, 2]
    order = np.arange(100)[::-1]
    assert some_of(order, 100) is order
    assert some_of(order, 4).tolist() == [99, 66, 33, 0]
