"""Checkpoints of the original: what is inferred, equal numbers, every way of saving, and what is refused."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateloop_transformer import GateLoopedAttention, SimpleGateLoopLayer, Transformer, load_model, load_tokenizer
from gateloop_transformer.cli import main
from gateloop_transformer.conversion.convert import convert, read_arguments
from gateloop_transformer.data.bpe import train_tokenizer

RECORDED = Path(__file__).parent.parent / "recorded"
MODELS = sorted(RECORDED.glob("parity/*model_*.npz"))
# What no shape shows.
HIDDEN = ["attn_softmax_normalize", "frac_gradient_state_transition", "ablate_complex", "ablate_state_transition"]
ATTENTION = {"use_gate_looped_attn": False, "ff_mult": 1}


def states(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def logits(folder: Path, ids: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(folder)(torch.as_tensor(ids))
    return found


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_converted_models_give_the_numbers_of_the_original(path: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays["meta"]))
    init, call = meta["init"], meta["call"]
    given = {name: value for name, value in (init | call).items() if name in HIDDEN}
    if not init.get("use_gate_looped_attn", True) and not init.get("rotary_emb"):
        given["dim_head"] = init["dim_head"]
    weights = {name[6:]: torch.from_numpy(values) for name, values in arrays.items() if name.startswith("param:")}
    report = convert(saved(weights, tmp_path / "original.pt"), tmp_path / "out", given)
    expected = torch.from_numpy(arrays["out:logits"])
    scale = max(1.0, expected.abs().max().item())
    assert (logits(tmp_path / "out", arrays["in:ids"]) - expected).abs().max().item() <= 1e-5 * scale
    values = report["unused"] | report["assumed"] | report["inferred"] | report["given"]
    unused = {name: value for name, value in init.items() if name in report["unused"]}
    assert {name: values[name] for name in init if name not in unused} == {k: init[k] for k in init if k not in unused}
    assert report["given"] == given
    assert set(report["assumed"]) <= set(HIDDEN)


def test_a_checkpoint_of_the_original_as_it_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = RECORDED / "checkpoints" / "attention_ddp.pt"
    recorded = torch.load(path, weights_only=True)["recorded"]
    command = ["convert", str(path), "--out", str(tmp_path / "out"), "--config", '{"heads": 2}']
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["entry"], report["left_out"]) == ("model", ["optimizer", "recorded", "step"])
    assert (report["inferred"]["dim_head"], report["given"]) == (4, {"heads": 2})
    assert report["assumed"] == {"attn_softmax_normalize": True}
    assert (logits(tmp_path / "out", recorded["ids"]) - recorded["logits"]).abs().max() <= 1e-5
    assert main([*command, "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert "given: heads 2\n" in out
    assert "768 parameters, float32" in out
    assert err == "gateloop convert: no --tokenizer: the model has 17 tokens, and text cannot be encoded for it\n"


@pytest.mark.parametrize(
    ("name", "wrap", "entry"),
    [
        ("plain.pt", lambda own: own, ""),
        ("legacy.pt", lambda own: own, ""),
        ("file.safetensors", lambda own: own, ""),
        ("no-suffix", lambda own: own, ""),
        ("ddp.pt", lambda own: {"module." + name: value for name, value in own.items()}, ""),
        ("deepspeed.pt", lambda own: {"module": own, "global_steps": 3}, "module"),
        ("lightning.pt", lambda own: {"state_dict": {f"net.{n}": v for n, v in own.items()}}, "state_dict.net"),
        ("ema.pt", lambda own: {"step": torch.tensor(3), **{f"ema._orig_mod.{n}": v for n, v in own.items()}}, "ema"),
        ("inside.pt", lambda own: {n.replace(".fn.", ".fn._orig_mod."): v for n, v in own.items()}, ""),
        ("two.pt", lambda own: {"ema": own, "model": {n: v + 1 for n, v in own.items()}}, "ema"),
        ("under.pt", lambda own: {**own, "ema": {n: v + 1 for n, v in own.items()}}, ""),
        (
            "ordered.pt",
            lambda own: {"model": OrderedDict(own), "best": 1.5, "optimizer": {"state": {0: None}}},
            "model",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_layout_of_a_file_gives_the_same_tensors(name: str, wrap: Any, entry: str, tmp_path: Path) -> None:
    own = states(Transformer(8, num_tokens=5, depth=1))
    path = tmp_path / name
    if name in ("file.safetensors", "no-suffix"):
        save_file(own, path)
    else:
        torch.save(wrap(own), path, _use_new_zipfile_serialization=name != "legacy.pt")
    report = convert(path, tmp_path / "out", {}, entry=entry if name in ("two.pt", "under.pt") else None)
    assert report["entry"] == entry
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_heads_that_cannot_be_seen_are_asked_for(tmp_path: Path) -> None:
    usual = saved(states(Transformer(4, num_tokens=5, depth=1, **ATTENTION)), tmp_path / "usual.pt")
    with pytest.raises(ValueError, match=r"dim_head is 512, heads one of 1, 2, 4, .*'\{\"heads\": 8\}'.*64, fits"):
        convert(usual, tmp_path / "out", {})
    with pytest.raises(ValueError, match=r"heads 3 contradicts the checkpoint, in which heads × dim_head is 512"):
        convert(usual, tmp_path / "out", {"heads": 3})
    with pytest.raises(ValueError, match="heads 8, dim_head 32 contradicts"):
        convert(usual, tmp_path / "out", {"heads": 8, "dim_head": 32})
    assert convert(usual, tmp_path / "out", {"dim_head": 32})["inferred"]["heads"] == 16
    pairs = Transformer(4, num_tokens=5, depth=1, heads=3, dim_head=6, data_dependent_rel_pos=True, **ATTENTION)
    path = saved(states(pairs), tmp_path / "pairs.pt")
    with pytest.raises(ValueError, match=r"heads one of 1, 3, 9; .* does not fit"):
        convert(path, tmp_path / "new", {})
    rotary = Transformer(4, num_tokens=5, depth=1, heads=3, dim_head=6, rotary_emb=True, **ATTENTION)
    path = saved(states(rotary), tmp_path / "rotary.pt")
    assert convert(path, tmp_path / "turned", {})["inferred"]["heads"] == 3
    with pytest.raises(ValueError, match=r"heads 9 contradicts .* heads one of 3"):
        convert(path, tmp_path / "again", {"heads": 9})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"dim": 9, "depth": 1}, "dim 9 was given, the checkpoint has 8"),
        ({"gate_loop_heads": None}, "gate_loop_heads None was given, the checkpoint has 2"),
        ({"use_gate_looped_attn": False}, "the checkpoint has True"),
        ({"gate": "ring"}, "the original has no argument 'gate'; there are dim, num_tokens"),
        ({"heads": 8.0}, "heads must be a whole number, not 8.0"),
        ({"heads": 0}, "heads must be at least 1, not 0"),
        ({"sub_ln": 1}, "sub_ln must be true or false, not 1"),
        ({"frac_gradient_state_transition": 2}, r"must be in \[0, 1\], not 2"),
    ],
)
def test_values_that_contradict_or_mean_nothing_are_refused(given: Any, problem: str, tmp_path: Path) -> None:
    path = saved(states(Transformer(8, num_tokens=5, depth=1, gate_loop_heads=2)), tmp_path / "original.pt")
    with pytest.raises(ValueError, match=problem):
        convert(path, tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_given_values_are_kept_and_null_is_what_it_stands_for(tmp_path: Path) -> None:
    path = saved(states(Transformer(8, num_tokens=5, depth=1)), tmp_path / "original.pt")
    given = {"gate_loop_heads": None, "dim_gate_looped_attn": None, "ablate_complex": True, "num_tokens": 5}
    report = convert(path, tmp_path / "out", {**given, "checkpoint_gate_looped_attn": False})
    assert report["given"]["gate_loop_heads"] == report["given"]["dim_gate_looped_attn"] == 8
    model = load_model(tmp_path / "out")
    assert (model.ablate_complex, model.ablate_state_transition) == (True, False)


class Code:
    """A pickle of it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path, new: bool) -> None:
    mark = tmp_path / "executed"
    content = {"model": states(Transformer(8, num_tokens=5, depth=1)), "extra": Code(f"touch {mark}")}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"is refused: its pickle asks for posix.system, .* nothing was executed"):
        convert(tmp_path / "bad.pt", tmp_path / "out", {})
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"asks for .*Transformer, .* nothing was executed"):
        convert(saved(Transformer(8, num_tokens=5, depth=1), tmp_path / "module.pt"), tmp_path / "out", {})


def newer(path: Path) -> None:
    """A checkpoint that says that it is of a later torch."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in files.items():
            new.writestr(name, b"99\n" if name.endswith("/version") else content)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    good = saved(states(Transformer(8, num_tokens=5, depth=1)), tmp_path / "good.pt")
    content = good.read_bytes()
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    newer(good)
    for name, problem in (
        ("absent.pt", "no file"),
        ("folder.pt", "is a folder"),
        ("empty.pt", "is empty"),
        ("text.pt", "is no checkpoint of torch or safetensors, or it is damaged"),
        ("cut.pt", "damaged"),
        ("cut.safetensors", "is damaged"),
        ("good.pt", "written by a newer torch"),
    ):
        with pytest.raises(ValueError, match=problem):
            convert(tmp_path / name, tmp_path / "out", {})


def changed(**changes: Any) -> dict[str, Any]:
    """A state dict with entries replaced, or with None taken out; dots are written as two underscores."""
    own: dict[str, Any] = states(Transformer(8, num_tokens=5, depth=2))
    own |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in own.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (torch.ones(2), "holds one Tensor, not a state dict"),
        ({"loss": 1.0}, "holds no tensors"),
        (GateLoopedAttention(8).state_dict(), r"looks like a single GateLoopedAttention \(to_qkv.weight\)"),
        ({"layer": SimpleGateLoopLayer(8).state_dict()}, "looks like a single SimpleGateLoopLayer"),
        (torch.nn.Linear(2, 2).state_dict(), "has no token_emb.weight among weight, bias$"),
        (changed(token_emb__weight=None), "has no token_emb.weight among layers.0.0"),
        ({"a": changed(), "b": changed()}, "several models: choose one with --entry 'a' or 'b'"),
        (changed(extra=torch.ones(2)), "not a Transformer of gateloop-transformer 0.2.5: extra is unknown"),
        (changed(extra=torch.ones(2), more=torch.ones(2)), "extra is unknown and 1 more such"),
        (changed(layers__1__1__fn__0__bias=None), r"layers.1.1.fn.0.bias is missing"),
        (changed(layers__0__0__fn__to_qkv__weight=None), "must have either to_qkv.weight"),
        (changed(layers__0__0__fn__to_a__0__weight=None), "to_a.0.weight is missing"),
        (changed(layers__7__0__norm__gamma=torch.ones(8)), "numbered from 0 on without a gap; there are: 0, 1, 7"),
        (changed(layers__1__0__norm__gamma=torch.ones(9)), r"is \(9,\), expected \(8,\)"),
        (changed(token_emb__weight=torch.ones(5)), r"must be a matrix, and is \(5,\)"),
        (changed(layers__0__1__fn__0__weight=torch.ones(12, 8)), "12 rows, which is no multiple of the width 8"),
        (changed(to_logits__0__gamma=torch.ones(8, dtype=torch.int8)), "torch.int8 on cpu; expected a whole"),
        (changed(step=3), "step is no tensor but int"),
        ({**changed(), "module.token_emb.weight": torch.ones(5, 8)}, "has token_emb.weight twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_transformer_of_the_original_is_refused(content: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        convert(saved(content, tmp_path / "original.pt"), tmp_path / "out", {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_weights_is_kept_and_rotary_frequencies_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Transformer(8, num_tokens=5, depth=1, heads=2, dim_head=16, rotary_emb=True, **ATTENTION)
    exact = model.layers[0][0].fn.rotary_emb.freqs.detach().clone()
    report = convert(saved(model.to(dtype).state_dict(), tmp_path / "half.pt"), tmp_path / "out", {})
    found = load_file(tmp_path / "out" / "model.safetensors")
    freqs = found.pop("layers.0.0.fn.rotary_emb.freqs")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert torch.equal(freqs.float(), exact)
    assert any("with all digits" in note for note in report["warnings"]) == (dtype != torch.float64)


def test_rotary_frequencies_of_other_sizes(tmp_path: Path) -> None:
    own = states(Transformer(8, num_tokens=5, depth=1, heads=5, dim_head=6, rotary_emb=True, **ATTENTION))
    freqs = own["layers.0.0.fn.rotary_emb.freqs"]
    freqs.copy_(10000.0 ** (-torch.arange(0, 6, 2) / 7))
    with pytest.raises(ValueError, match="is of a head size of 7; rotary embedding needs an even one"):
        convert(saved(own, tmp_path / "odd.pt"), tmp_path / "out", {})
    freqs.copy_(torch.tensor([1.0, 0.5, 0.25]))
    assert "kept as they are" in convert(saved(own, tmp_path / "own.pt"), tmp_path / "out", {})["warnings"][0]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["layers.0.0.fn.rotary_emb.freqs"], freqs)


def test_tied_and_sliced_weights_are_written_whole(tmp_path: Path) -> None:
    model = Transformer(8, num_tokens=5, depth=1)
    model.to_logits[1].weight = model.token_emb.weight
    own = dict(model.state_dict())
    own["layers.0.0.norm.gamma"] = torch.arange(20.0)[2:18:2]
    convert(saved(own, tmp_path / "tied.pt"), tmp_path / "out", {})
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["to_logits.1.weight"], found["token_emb.weight"])
    assert found["layers.0.0.norm.gamma"].tolist() == list(range(2, 18, 2))


def test_only_conversions_are_overwritten(tmp_path: Path) -> None:
    path = saved(states(Transformer(8, num_tokens=5, depth=1)), tmp_path / "original.pt")
    out = tmp_path / "new" / "folder"
    convert(path, out, {})
    with pytest.raises(ValueError, match="already holds a model: replace it with --overwrite"):
        convert(path, out, {})
    convert(path, out, {"ablate_complex": True}, overwrite=True)
    assert load_model(out).ablate_complex
    with pytest.raises(ValueError, match="was written by this version of gateloop-transformer: it needs no conversion"):
        convert(out / "model.safetensors", tmp_path / "again", {})
    with pytest.raises(ValueError, match="is in the folder that would be overwritten"):
        convert(out / "model.safetensors", out, {}, overwrite=True)
    (out / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds metrics.jsonl: choose a folder that is new or empty"):
        convert(path, out, {}, overwrite=True)
    with pytest.raises(ValueError, match=r"holds new: choose a folder that is new or empty"):
        convert(path, tmp_path, {}, overwrite=True)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        convert(path, path, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"holds config.json: choose"):
        convert(path, tmp_path / "other", {}, overwrite=True)


def test_tokens_are_bytes_or_those_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte, out = saved(states(Transformer(8, num_tokens=256, depth=1)), tmp_path / "bytes.pt"), tmp_path / "out"
    assert convert(byte, out, {})["tokenizer"] == load_tokenizer(out).kind == "bytes"
    assert convert(byte, tmp_path / "2", {}, tokenizer=str(out / "tokenizer.json"))["tokenizer"] == "bytes"
    tokenizer = train_tokenizer([[b"a text of a few words, and a few words more"]], 260)
    tokenizer.save_as(tmp_path / "bpe.json")
    larger = saved(states(Transformer(8, num_tokens=264, depth=1)), tmp_path / "bpe.pt")
    report = convert(larger, out, {}, tokenizer=str(tmp_path / "bpe.json"), overwrite=True)
    assert report["warnings"] == ["the tokenizer has 260 tokens, the model 264: the others are never read"]
    assert load_tokenizer(out).sha256 == tokenizer.sha256
    assert convert(larger, out, {}, overwrite=True)["tokenizer"] is None
    assert not (out / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="--tokenizer: bytes has 256 tokens, the model 264"):
        convert(larger, tmp_path / "3", {}, tokenizer="bytes")
    with pytest.raises(ValueError, match=r"--tokenizer: .*bpe.json has 260 tokens, the model 256"):
        convert(byte, tmp_path / "3", {}, tokenizer=str(tmp_path / "bpe.json"))
    assert not (tmp_path / "3").exists()
    assert main(["generate", str(tmp_path / "2"), "--prompt", "a", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_configurations_come_from_text_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"heads": 8}')
    (tmp_path / "list.json").write_text("[8]")
    assert read_arguments(' {"heads": 8}') == read_arguments(str(tmp_path / "config.json")) == {"heads": 8}
    for text, problem in (
        ("absent.json", "is neither a JSON object nor a file"),
        ('{"heads": }', "is not JSON"),
        (str(tmp_path / "list.json"), "expected an object"),
    ):
        assert main(["convert", "original.pt", "--out", str(tmp_path / "out"), "--config", text]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert len(error.splitlines()) == 1
