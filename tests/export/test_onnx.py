"""A model as ONNX files gives the model's tokens in onnxruntime."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import processes
import pytest
import torch
from options import ONNX, VOCABULARY, config, shaken
from torch import Tensor, nn

from gateloop_transformer import CausalFullAttention, GateLoopedAttention, Transformer
from gateloop_transformer.export import OnnxGenerator, export_onnx
from gateloop_transformer.layers.feedforward import FeedForward
from gateloop_transformer.layers.norm import PostNorm, PreNorm

DIM = 12
# More than a chunk's 64 steps, or its 16 where each channel has gates of its own.
BLOCKS = {"gates": 4, "others": 70, "attention": 4, "position": 17}


class RealGates(GateLoopedAttention):
    """As in a model with ablate_complex."""

    def forward(self, x: Tensor, state: Any = None, **flags: Any) -> Any:
        return super().forward(x, state, **{**flags, "ablate_complex": True})


class Still(GateLoopedAttention):
    """As in a model with ablate_state_transition."""

    def forward(self, x: Tensor, state: Any = None, **flags: Any) -> Any:
        return super().forward(x, state, **{**flags, "ablate_state_transition": True})


Gate = partial(GateLoopedAttention, DIM)
Attention = partial(CausalFullAttention, DIM, heads=2, dim_head=4)
# A file takes seconds to write, so each has layers of every kind; what single options compute is test_plain's.
LAYERS: dict[str, list[Callable[[], nn.Module]]] = {
    "gates": [
        Gate,
        partial(Gate, heads=2, gate="ring", head_norm=True, qk_norm=True, conv_size=3),
        partial(Gate, gate="ring", fixed_gates=True, conv_size=2, conv_silu=True, qkv_bias=True),
    ],
    "others": [
        partial(Still, DIM),
        partial(RealGates, DIM, heads=3, gate="paper", sub_ln=True, add_swish_gating=False),
        partial(Attention, window=3, rotary_emb=True, qk_norm=True),
    ],
    "attention": [partial(Attention, rotary_emb=True, add_swish_gating=True), Gate],
    "position": [partial(Attention, data_dependent_rel_pos="gate_loop", softmax_normalize=True)],
}


def make(name: str) -> Transformer:
    """A model of the layers of that name, norms before and after them in turn, one with a feed-forward."""
    torch.manual_seed(0)
    model = Transformer(DIM, num_tokens=VOCABULARY, depth=1)
    model.layers = nn.ModuleList()
    for n, mixer in enumerate(LAYERS[name]):
        wrapper = PostNorm if n % 2 else PreNorm
        feed_forward = nn.Identity() if n else PreNorm(DIM, FeedForward(DIM, 2))
        model.layers.append(nn.ModuleList([wrapper(DIM, mixer()), feed_forward]))
    return shaken(model)


# The command's test has attention; what is left to the slow ones differs in operators that test_plain knows.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param("gates", marks=ONNX),
        *(pytest.param(name, marks=[pytest.mark.slow, ONNX]) for name in ("others", "attention", "position")),
    ],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    folder = tmp_path_factory.mktemp("onnx") / request.param
    model = make(request.param)
    export_onnx(model, folder, block=BLOCKS[request.param], tokenizer="bytes")
    return model, folder


@torch.no_grad()
def test_logits_and_tokens_are_the_models(exported: tuple[Transformer, Path]) -> None:
    model, folder = exported
    runtime = OnnxGenerator(folder, threads=1)
    block = runtime.block
    for B, T in ((1, 1), (3, block - 1), (2, block), (3, 2 * block + 3)):
        ids = torch.randint(VOCABULARY, (B, T))
        logits, _ = runtime.read(ids.numpy())
        np.testing.assert_allclose(logits, model(ids)[:, -1].numpy(), rtol=0, atol=1e-4)
        tokens = runtime.generate(ids.numpy(), 10)
        np.testing.assert_array_equal(tokens, model.generate(ids, 10, temperature=0).numpy())


def test_a_prompt_in_pieces_is_the_whole(exported: tuple[Transformer, Path]) -> None:
    runtime = OnnxGenerator(exported[1], threads=1)
    block = runtime.block
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(2, 3 * block + 1))
    whole, last = runtime.read(ids)
    for cut in (1, block, block + 2):
        _, state = runtime.read(ids[:, :cut])
        logits, state = runtime.read(ids[:, cut:], state)
        np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-4)
        for part, expected in zip(state, last, strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-3, atol=1e-4)


def test_files_are_of_plain_operators_and_real_numbers(exported: tuple[Transformer, Path]) -> None:
    folder = exported[1]
    description = json.loads((folder / "model.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "prompt.onnx", "step.onnx"]
    names = [part["name"] for part in description["state"]]
    for file, length in (("step.onnx", 1), ("prompt.onnx", description["block"])):
        model = onnx.load(folder / file)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(each.domain, each.version) for each in model.opset_import] == [("", description["opset"])]
        assert [given.name for given in model.graph.input] == ["ids", *names]
        assert [given.name for given in model.graph.output] == ["logits", *(f"{name}.next" for name in names)]
        kinds = {each.type.tensor_type.elem_type for each in [*model.graph.input, *model.graph.output]}
        assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
        shape = [size.dim_param or size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
        assert shape == ["batch", length]
        assert str(Path(__file__).parent.parent.parent).encode() not in (folder / file).read_bytes()


def test_the_description_says_what_the_state_is(exported: tuple[Transformer, Path]) -> None:
    model, folder = exported
    description = json.loads((folder / "model.json").read_text())
    runtime = OnnxGenerator(folder)
    assert description["block"] == runtime.block == BLOCKS[folder.name]
    assert description["vocabulary"] == runtime.vocabulary == VOCABULARY
    assert description["tokenizer"] == runtime.tokenizer == "bytes"
    _, state = runtime.read([[1, 2, 3], [4, 5, 6]])
    sizes = {"batch": 2, "past": 3}
    for part, array in zip(description["state"], state, strict=True):
        assert array.dtype == part["dtype"]
        assert array.shape == tuple(sizes.get(size, size) for size in part["shape"])
    attention = [isinstance(block[0].fn, CausalFullAttention) for block in model.layers]  # type: ignore[index]
    assert description["layers"] == ["attention" if each else "gate" for each in attention]


def test_the_runner_needs_no_torch(exported: tuple[Transformer, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from gateloop_transformer.export import OnnxGenerator; "
        f"print(OnnxGenerator({str(exported[1])!r}).generate([[1, 2]], 3).shape)"
    )
    done = processes.run([sys.executable, "-c", code])
    assert (done.stdout, done.stderr) == ("(1, 5)\n", "")


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([1, 2], r"integers of shape \(B, T\)"),
        ([[0.5]], r"integers of shape \(B, T\)"),
        (np.zeros((1, 0), int), r"T ≥ 1"),
        ([[VOCABULARY]], r"ids must be in \[0, 20\), got 20 to 20"),
        ([[-1]], r"ids must be in \[0, 20\)"),
    ],
    ids=str,
)
def test_ids_that_are_none_are_refused(exported: tuple[Transformer, Path], ids: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        OnnxGenerator(exported[1], threads=1).generate(ids, 1)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda folder: (folder / "model.json").unlink(), r"holds no exported model: it has no model\.json"),
        (lambda folder: _cut(folder / "model.json"), r"model\.json' is damaged"),
        (lambda folder: (folder / "model.json").write_text("[]"), r"model\.json' is damaged"),
        (lambda folder: (folder / "model.json").write_text('{"format": 2}'), "of format 2, this library reads 1"),
        (lambda folder: (folder / "model.json").write_text('{"format": 1}'), "it lacks block, files"),
        (lambda folder: (folder / "step.onnx").unlink(), r"step\.onnx' is missing"),
        (lambda folder: _cut(folder / "prompt.onnx"), r"prompt\.onnx' is damaged, or of another model"),
    ],
    ids=["no description", "cut", "no object", "newer", "empty", "missing", "damaged"],
)
def test_damage_is_one_clear_error(
    exported: tuple[Transformer, Path], tmp_path: Path, harm: Callable[[Path], Any], problem: str
) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "copy")
    harm(folder)
    with pytest.raises(ValueError, match=problem):
        OnnxGenerator(folder)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = config("polar").build()
    (tmp_path / "step.onnx").write_text("mine")
    with pytest.raises(ValueError, match=r"step\.onnx' already exists: replace it with overwrite=True"):
        export_onnx(model, tmp_path)
    assert (tmp_path / "step.onnx").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file, not a folder"):
        export_onnx(model, tmp_path / "step.onnx")
    with pytest.raises(ValueError, match="block must be at least 2 tokens, not 1"):
        export_onnx(model, tmp_path / "new", block=1)
    with pytest.raises(ValueError, match=r"must be in float32, not torch\.bfloat16"):
        export_onnx(config("polar").build().bfloat16(), tmp_path / "new")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript is not installed; `pip install gateloop-transformer\[export\]`"):
        export_onnx(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
