"""The layers and the model in JAX are torch's: values, states, losses, gradients, files and what is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from both_sides import to_jax, to_torch
from cases import assert_equal
from models import MODELS
from torch import Tensor, nn

import gateloop_transformer as gt
import gateloop_transformer.jax as gj
from gateloop_transformer.configuration import RECIPE
from gateloop_transformer.jax import modules
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.training.optimizer import parameter_groups

KINDS = ["polar", "recipe", "spread heads", "norm after wide", "fixed real", "window heads", "gate_loop", "released"]


def both(**options: Any) -> tuple[gt.Transformer, gj.Transformer, Any]:
    # Compilers take long over what stands there twice.
    depth = 2 if "layer_pattern" in options else 1
    options = {"dim_head": 4, **options}
    if options.get("data_dependent_rel_pos") == "released":
        # By its name in configurations alone.
        options["data_dependent_rel_pos"] = True
    model = gt.Transformer(16, num_tokens=11, depth=depth, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, gj.Transformer(16, num_tokens=11, depth=depth, **options), params_of(model)


def params_of(module: nn.Module) -> Any:
    return gj.unflatten({name: x.numpy() for name, x in module.state_dict().items()})


def states_of(state: Any) -> list[Tensor]:
    return [state.detach()] if isinstance(state, Tensor) else [x for item in state for x in states_of(item)]


@pytest.mark.parametrize("name", KINDS)
def test_the_initial_state_is_no_state_and_torchs(name: str) -> None:
    model, described, params = both(**MODELS[name])
    start = described.initial_state(2, jnp.float64)
    for x, y in zip(jax.tree.leaves(start), states_of(model.initial_state(2)), strict=True):
        torch.testing.assert_close(to_torch(x), y, check_dtype=y.is_floating_point())
    ids = jnp.zeros((2, 3), int)
    shapes = [
        jax.eval_shape(lambda state: described.apply(params, ids, state, return_state=True), each)
        for each in (start, None)
    ]
    assert shapes[0] == shapes[1]
    if name == "window heads":
        for x, y in zip(
            *(described.apply(params, ids, state, return_state=True) for state in (start, None)), strict=True
        ):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), x, y)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_in_two_pieces_with_its_gradients(name: str) -> None:
    model, described, params = both(**MODELS[name])
    ids, resets = torch.randint(0, 11, (2, 13)), torch.rand(2, 13) < 0.2
    model(ids, return_loss=True, resets=resets).backward()

    def run(params: Any, ids: Any, resets: Any) -> Any:
        first, state = described.apply(params, ids[:, :7], resets=resets[:, :7], return_state=True)
        second, state = described.apply(params, ids[:, 7:], state, resets=resets[:, 7:], return_state=True)
        loss = jax.value_and_grad(lambda params: described.loss(params, ids, resets=resets))(params)
        return first, second, jax.tree.leaves(state), loss

    first, second, state, (loss, slopes) = jax.jit(run)(params, *to_jax((ids, resets)))
    with torch.no_grad():
        expected, past = model(ids[:, :7], resets=resets[:, :7], return_state=True)
        later, past = model(ids[:, 7:], past, resets=resets[:, 7:], return_state=True)
        whole = model(ids, return_loss=True, resets=resets)
    assert_equal([to_torch(x) for x in (first, second, loss)], [expected, later, whole])
    for x, y in zip(state, states_of(past), strict=True):
        torch.testing.assert_close(to_torch(x), y, check_dtype=y.is_floating_point(), rtol=1e-10, atol=1e-10)
    flat = gj.flatten(slopes)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_equal([to_torch(flat[n]) for n in names], [torch.zeros(0) if grads[n] is None else grads[n] for n in names])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["gate loop", "simple"])
def test_layers_read_documents_as_torchs_do(name: str, reverse: bool) -> None:
    options: dict[str, Any] = {"reverse": reverse}
    if name == "gate loop":
        options |= {"heads": 2, "conv_size": 3, "gate": "ring"}
    kind = {"gate loop": "GateLoopedAttention", "simple": "SimpleGateLoopLayer"}[name]
    layer = getattr(gt, kind)(6, **options).double()
    x, bounds = torch.randn(1, 12, 6, dtype=torch.float64), torch.tensor([0, 0, 5, 6, 12])
    resets = torch.rand(1, 12) < 0.2
    _, state = layer(torch.randn(4, 3, 6, dtype=torch.float64), return_state=True)
    y, last = layer(x, state=state, resets=resets, cu_seqlens=bounds, return_state=True)
    before = getattr(gj, type(state).__name__)(*to_jax(tuple(state)))
    described = getattr(gj, kind)(6, **options)
    run = jax.jit(lambda *a: described.apply(*a[:3], resets=a[3], cu_seqlens=a[4], return_state=True))
    found, after = run(params_of(layer), to_jax(x), before, *to_jax((resets, bounds)))
    assert_equal([to_torch(z) for z in (found, *after)], [z.detach() for z in (y, *last)])


def test_attention_of_documents_sees_none_but_its_own() -> None:
    model, described, params = both(**MODELS["attention"], rotary_emb=True)
    ids, bounds = torch.randint(0, 11, (1, 12)), torch.tensor([0, 5, 5, 12])
    apply, loss = jax.jit(described.apply), jax.jit(described.loss)
    logits = apply(params, to_jax(ids), cu_seqlens=to_jax(bounds))
    assert_equal([to_torch(logits)], [model(ids, cu_seqlens=bounds).detach()])
    mean = loss(params, to_jax(ids), cu_seqlens=to_jax(bounds))
    assert_equal([to_torch(mean)], [model(ids, return_loss=True, cu_seqlens=bounds).detach()])
    with pytest.raises(NotImplementedError, match="give documents as rows"):
        described.apply(params, to_jax(ids), cu_seqlens=to_jax(bounds), return_state=True)


@pytest.mark.parametrize("name", ["recipe", "window heads", "gate_loop"])
def test_greedy_decoding_is_torchs(name: str) -> None:
    model, described, params = both(**MODELS[name])
    ids = torch.randint(0, 11, (2, 4))
    found = gj.generate(described, params, to_jax(ids), 15, temperature=0)
    assert torch.equal(to_torch(found), model.eval().generate(ids, 15, temperature=0))
    assert torch.equal(to_torch(gj.generate(described, params, to_jax(ids), 0, temperature=0)), ids)


def test_tokens_are_drawn_as_asked() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 400)

    def drawn(**options: Any) -> set[int]:
        return set(jax.vmap(lambda key: gj.generation.pick(logits, key, **options))(keys).ravel().tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == drawn(top_p=0.7) == drawn(min_p=0.4) == {0, 1}
    assert drawn(temperature=0.0) == drawn(top_p=0.1) == {0}
    _, described, params = both()
    with pytest.raises(ValueError, match="needs a key"):
        gj.generate(described, params, jnp.zeros((1, 1), int), 3)
    with pytest.raises(ValueError, match="top_k must be an integer"):
        gj.generate(described, params, jnp.zeros((1, 1), int), 3, top_k=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models_go_to_jax_and_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = gt.TransformerConfig.recommended(16, 2, context=64)
    model = config.build(11).to(dtype)
    save_file(model.state_dict(), tmp_path / "torch.safetensors")
    gj.save_model(tmp_path / "jax", gj.Transformer.of(config, 11), gj.load_params(tmp_path / "torch.safetensors"))
    described, params = gj.load_model(tmp_path / "jax")
    gj.save_params(tmp_path / "back.safetensors", params)
    back = load_file(tmp_path / "back.safetensors")
    assert described == gj.Transformer.of(config, 11)
    assert back.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert back[name].dtype == x.dtype
        assert torch.equal(back[name], x)
    if dtype == torch.float32:
        loaded = gt.load_model(tmp_path / "jax")
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_what_is_no_model_is_one_error(tmp_path: Path) -> None:
    _, described, params = both()
    with pytest.raises(ValueError, match=r"holds no model: it has no config.json"):
        gj.load_model(tmp_path)
    gj.save_model(tmp_path, described, params)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match=r"holds float64 \(layers"):
        gj.load_model(tmp_path)
    jax.config.update("jax_enable_x64", True)
    with pytest.raises(ValueError, match="is a file, not the folder"):
        gj.load_model(tmp_path / "config.json")
    other = gj.Transformer(16, num_tokens=12, depth=1)
    with pytest.raises(ValueError, match=r"weight is \(11, 16\), the model has \(12, 16\) and 1 more"):
        gj.save_model(tmp_path, other, params)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not have the checksum"):
        gj.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "depth": 10**6}))
    with pytest.raises(ValueError, match="layers, not 1000000"):
        gj.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(ValueError, match="is damaged"):
        gj.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 4, "model": {}}))
    with pytest.raises(ValueError, match="holds a run; choose another folder"):
        gj.save_model(tmp_path, described, params)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 11\), got 0 to 11"):
        described.apply(params, jnp.arange(12)[None])


@pytest.mark.parametrize("name", ["recipe", "window heads", "gate_loop"])
def test_parameters_are_grouped_as_torchs_optimizer_does(name: str) -> None:
    model, _, params = both(**MODELS[name])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    words = {(0.1, 1.0): "matrix", (0.0, 1.0): "other", (0.0, 0.5): "gate"}
    expected = {
        names[id(x)]: words[group["weight_decay"], group["factor"]]
        for group in parameter_groups(model, TrainingConfig())
        for x in group["params"]
    }
    found = gj.flatten(gj.parameter_groups(params))
    assert {name: word for name, word in found.items() if word != "fixed"} == expected


def test_new_parameters_have_torchs_names_and_spread() -> None:
    for name in KINDS:
        model, described, _ = both(**MODELS[name])
        own = gj.flatten(jax.eval_shape(described.init, jax.random.key(0)))
        assert {n: tuple(x.shape) for n, x in own.items()} == {n: tuple(x.shape) for n, x in model.state_dict().items()}
    fresh = gt.Transformer(64, num_tokens=50, depth=1, **RECIPE).state_dict()
    started = jax.jit(gj.Transformer(64, num_tokens=50, depth=1, **RECIPE).init)(jax.random.key(0))
    for name, x in gj.flatten(started).items():
        mean, deviation = float(fresh[name].mean()), float(fresh[name].std())
        # As far apart as two draws of that many numbers are.
        near = deviation * (0.1 + 5 / x.size**0.5) + 1e-6
        assert abs(float(x.mean()) - mean) < near, name
        assert abs(float(x.std()) - deviation) < near, name


def test_modules_train_under_equinox() -> None:
    model = modules.Transformer(16, num_tokens=11, depth=1, dropout=0.1, key=jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)

    @eqx.filter_jit
    def step(model: Any, key: Any) -> Any:
        loss, slopes = eqx.filter_value_and_grad(lambda model: model.loss(ids, key=key))(model)
        return loss, eqx.apply_updates(model, jax.tree.map(lambda x: -0.05 * x, slopes))

    losses = []
    for n in range(5):
        loss, model = step(model, jax.random.key(n))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    narrow, wide = eqx.filter_jit(lambda model: (model(ids, dtype=jnp.bfloat16), model(ids)))(model)
    assert (narrow.dtype, wide.shape) == (jnp.bfloat16, (2, 9, 11))
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=0.1)
