"""The examples that train: in pieces they give what they give at once, and they say what they lack."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["gateloop", "gru"])
def test_pixels_one_by_one_give_the_class_of_the_whole(model: str) -> None:
    digits = load("classify_digits")
    classifier = digits.Classifier(model).double().eval()
    pixels = torch.randn(3, 64, 1, dtype=torch.float64)
    streamed = digits.classify_stream(classifier, pixels)
    for seen in (1, 30, 64):
        assert_close(streamed[:, seen - 1], classifier(pixels[:, :seen])[0])


def test_samples_one_by_one_give_the_filtered_whole() -> None:
    example = load("filter_a_signal")
    model = example.Filter().double().eval()
    noisy, _ = example.make_signals(1, 300)
    whole, _ = model(noisy.double())
    streamed, states = example.filter_stream(model, noisy[0].double())
    assert_close(streamed, whole[0])
    _, first = example.filter_stream(model, noisy[0, :1].double())
    assert example.size(states) == example.size(first)


def test_the_linear_filter_is_the_best_of_its_length() -> None:
    example = load("filter_a_signal")
    noisy, clean = example.make_signals(20, 100)
    weights = example.linear_filter(noisy, clean, 8)
    past = example.lagged(noisy, 8)
    assert torch.equal(past[..., -1:], noisy)
    best = example.rms(past @ weights, clean)
    for _ in range(10):
        assert example.rms(past @ (weights + 0.01 * torch.randn_like(weights)), clean) > best


@pytest.mark.parametrize("arguments", [["--model", "gateloop"], ["--model", "gru"], ["--permuted"]], ids="-".join)
def test_a_seed_gives_the_same_digits_again(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    digits = load("classify_digits")
    outputs = []
    for _ in range(2):
        digits.main(["--steps", "2", "--seed", "3", *arguments])
        outputs.append([line for line in capsys.readouterr().out.splitlines() if "CPU time" not in line])
    assert outputs[0] == outputs[1]
    assert outputs[0][-1] == "one by one gives the classes of the whole: True"


def test_a_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="needs scikit-learn: pip install"):
        load("classify_digits").main(["--steps", "1"])
