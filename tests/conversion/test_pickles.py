"""Whole modules that the original pickled: they load and compute the same, and are converted without running code."""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gateloop_transformer import SimpleGateLoopLayer, Transformer, load_model
from gateloop_transformer.cli import main
from gateloop_transformer.conversion import pickled_modules
from gateloop_transformer.conversion.convert import convert

PICKLES = Path(__file__).parent.parent / "recorded" / "pickles"
MODELS = ["gates", "attention", "position"]


class Rearrange(nn.Module):
    """What the pickles need of einops, and no more."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.pattern = state["pattern"]


class RotaryEmbedding(nn.Module):
    """What the pickles need of rotary-embedding-torch, and no more."""


@pytest.fixture
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages that the original's pickles name, as far as these need them."""
    for name, kind in (
        ("einops.layers.torch", Rearrange),
        ("rotary_embedding_torch.rotary_embedding_torch", RotaryEmbedding),
    ):
        parts = name.split(".")
        for n in range(len(parts)):
            module = types.ModuleType(".".join(parts[: n + 1]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", name)


@pytest.fixture
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them can be imported."""
    for name in ("einops", "rotary_embedding_torch"):
        monkeypatch.setitem(sys.modules, name, None)


def unpacked(name: str) -> io.BytesIO:
    return io.BytesIO(gzip.decompress((PICKLES / f"{name}.pt.gz").read_bytes()))


def file(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pt"
    path.write_bytes(unpacked(name).getvalue())
    return path


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.usefixtures("_packages")
@pytest.mark.parametrize("name", [*MODELS, "simple"])
def test_what_the_original_pickled_computes_the_same(name: str) -> None:
    saved = torch.load(unpacked(name), weights_only=False)
    module, x = saved["model"], saved["input"].requires_grad_("gradient" in saved)
    assert type(module) is (SimpleGateLoopLayer if name == "simple" else Transformer)
    assert not [child for child in module.modules() if type(child) is Rearrange]
    y = module(x)
    assert relative_error(y, saved["output"]) <= 2e-6
    if name == "simple":
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x)
        assert relative_error(grad, saved["gradient"]) <= 2e-5
    # As any module of this package from now on.
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x), y)
        assert list(again.state_dict()) == list(module.state_dict())


@pytest.mark.usefixtures("_packages")
def test_a_model_from_a_pickle_is_one_of_this_package() -> None:
    model = torch.load(unpacked("attention"), weights_only=False)["model"]
    ids = torch.tensor([[1, 2, 3]])
    logits, state = model(ids, return_state=True)
    assert torch.allclose(model(ids[:, :1], return_state=True)[0], logits[:, :1], atol=1e-6)
    assert state.layers[0].keys.shape == (1, 3, 3, 4)
    assert model.generate(ids, 2, temperature=0).shape == (1, 5)
    own = Transformer(
        4, num_tokens=9, depth=1, ff_mult=1, use_gate_looped_attn=False, heads=3, dim_head=4, rotary_emb=True,
        post_ln_norm=True, attn_softmax_normalize=False,
    )  # fmt: skip
    own.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(own(ids), logits)


@pytest.mark.usefixtures("_no_packages")
def test_packages_that_a_pickle_needs_are_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"einops|rotary_embedding_torch"):
        torch.load(unpacked("attention"), weights_only=False)


@pytest.mark.usefixtures("_packages")
def test_pickles_of_other_releases_are_refused() -> None:
    layer = torch.load(unpacked("gates"), weights_only=False)["model"].layers[0][0].fn
    state = {name: value for name, value in vars(layer).items() if name not in ("gate", "heads")}
    with pytest.raises(
        ValueError, match=r"not pickled by gateloop-transformer 0\.2\.5 \('heads'\).* save the state dict"
    ):
        type(layer).__new__(type(layer)).__setstate__(state)


@pytest.mark.usefixtures("_no_packages")
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_are_converted_with_all_that_they_show(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(file(name, tmp_path)), "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["entry"], report["left_out"], report["given"], report["assumed"]) == (
        "model",
        ["input", "output"],
        {},
        {},
    )
    shown = {
        "gates": {"gate_loop_heads": 2, "frac_gradient_state_transition": 0.5, "ablate_complex": True, "sub_ln": True},
        "attention": {"heads": 3, "dim_head": 4, "attn_softmax_normalize": False, "rotary_emb": True},
        "position": {"heads": 3, "dim_head": 4, "data_dependent_rel_pos": True, "attn_add_swish_gating": False},
    }[name]
    assert {key: report["inferred"][key] for key in shown} == shown
    # The stand-ins for tensors and plain values of the file, which is all that is needed of it here.
    with torch.serialization.safe_globals(list(pickled_modules.STAND_INS)):
        saved = torch.load(unpacked(name), weights_only=True)
    with torch.no_grad():
        logits = load_model(tmp_path / "out")(saved["input"])
    assert relative_error(logits, saved["output"]) <= 2e-6


def test_given_values_must_be_those_of_the_model(tmp_path: Path) -> None:
    path = file("attention", tmp_path)
    given = {"heads": 3, "dim_head": 4, "attn_softmax_normalize": False}
    assert convert(path, tmp_path / "out", given)["given"] == given
    for name, value in {"heads": 6, "dim_head": 2, "attn_softmax_normalize": True, "ablate_complex": True}.items():
        with pytest.raises(ValueError, match=name):
            convert(path, tmp_path / "other", {name: value})
    with pytest.raises(ValueError, match="attn_softmax_normalize None was given, the checkpoint has False"):
        convert(path, tmp_path / "other", {"attn_softmax_normalize": None})


def mixer(content: Any) -> Any:
    return content["model"].attributes["_modules"]["layers"].attributes["_modules"]["0"].attributes["_modules"]["0"]


def inner(module: Any, *names: str) -> Any:
    for name in names:
        module = module.attributes["_modules"][name]
    return module


def kind(name: str) -> Any:
    return next(each for each in pickled_modules.STAND_INS if each.__name__ == name)()


CHANGES: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "activation": (
        "gates",
        lambda content: inner(mixer(content), "fn", "to_gates").attributes["_modules"].update({"1": kind("GELU")}),
        r"layers\.0\.0\.fn\.to_gates\.1 is a part of the kind GELU, where .* has a part of the kind SiLU",
    ),
    "number": (
        "attention",
        lambda content: inner(mixer(content), "norm").attributes.update(eps=1e-3),
        r"layers\.0\.0\.norm has eps 0\.001, in gateloop-transformer 0\.2\.5 1e-05",
    ),
    "attribute": (
        "gates",
        lambda content: inner(mixer(content), "fn").attributes.pop("frac_gradient_state_transition"),
        r"layers\.0\.0\.fn has no frac_gradient_state_transition as",
    ),
    "more": (
        "gates",
        lambda content: inner(mixer(content), "fn").attributes["_modules"].update(extra=kind("SiLU")),
        r"layers\.0\.0\.fn\.extra is a part of the kind SiLU, where .* has nothing",
    ),
    "less": (
        "gates",
        lambda content: inner(mixer(content), "fn", "to_gates").attributes["_modules"].pop("1"),
        r"layers\.0\.0\.fn\.to_gates\.1 is missing, where gateloop-transformer 0\.2\.5 has a part of the kind SiLU",
    ),
    "cycle": (
        "gates",
        lambda content: mixer(content).attributes["_modules"].update(fn=content["model"]),
        "modules are nested more than",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_computes_something_else_is_refused(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, alter, problem = CHANGES[change]
    load = torch.load

    def altered(*arguments: Any, **options: Any) -> Any:
        content = load(*arguments, **options)
        alter(content)
        return content

    monkeypatch.setattr(torch, "load", altered)
    with pytest.raises(ValueError, match=problem):
        convert(file(name, tmp_path), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_whole_models_of_this_package_are_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(Transformer(4, num_tokens=9, depth=1), tmp_path / "own.pt")
    with pytest.raises(
        ValueError, match=r"model = torch\.load\(OLD, weights_only=False\); torch\.save\(model\.state_dict"
    ):
        convert(tmp_path / "own.pt", tmp_path / "out", {})
    torch.save(nn.Linear(2, 2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a whole module in torch's old format of files, .* nothing was executed"):
        convert(tmp_path / "old.pt", tmp_path / "out", {})
    with pytest.raises(ValueError, match=r"asks for gateloop_transformer\.simplified_gate_loop\.SimpleGateLoopLayer"):
        convert(file("simple", tmp_path), tmp_path / "out", {})
