"""What needs a process of its own: several devices, and an environment without torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import processes
import pytest

SHARDED = """
import functools, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import gateloop_transformer.jax as gj

jax.config.update("jax_enable_x64", True)
mesh = Mesh(np.array(jax.devices()), ("time",))
key = iter(jax.random.split(jax.random.key(0), 99))
normal = lambda *shape: jax.random.normal(next(key), shape)
t = P(None, "time")

def close(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)

def alike(x, y):
    # Finite at the same places, and equal there.
    fine = jax.tree.map(np.isfinite, y)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.isfinite, x), fine)
    close(*(jax.tree.map(lambda a, b: np.where(b, a, 0), z, fine) for z in (x, y)))
    assert fine[0].any() and not fine[0].all()

for K, V, reverse, check in ((1, 1, False, True), (3, 5, True, False))[-len(sys.argv):]:
    q, k, v, s = normal(2, 16, 2, K), normal(2, 16, 2, K), normal(2, 16, 2, V), normal(2, 2, K, V) + 1j
    a, resets = 0.9 * jnp.exp(1j * normal(2, 16, 2)), jax.random.bernoulli(next(key), 0.1, (2, 16))
    whole = lambda *x: gj.gate_loop(*x[:5], resets=x[5], reverse=reverse)
    one = functools.partial(gj.gate_loop, reverse=reverse, axis_name="time")
    part = lambda *x: one(*x[:5], resets=x[5])
    specs = {"in_specs": (t, t, t, t, P(), t), "out_specs": (t, P())}
    parts = jax.shard_map(part, mesh=mesh, check_vma=check, **specs)
    loss = lambda f: lambda *x: sum(jnp.square(jnp.abs(y)).sum() for y in f(*x))
    slopes = [jax.jit(jax.grad(loss(f), argnums=(0, 1, 2, 3, 4))) for f in (parts, whole)]
    parts, whole = jax.jit(parts), jax.jit(whole)
    arguments = q, k, v, a, s, resets
    close(parts(*arguments), whole(*arguments))
    close(*(slope(*arguments) for slope in slopes))
    k, resets = k.at[0, 5].set(jnp.nan), resets.at[0, jnp.array([3, 9])].set(True)
    arguments = q, k, v, a, s.at[1].set(jnp.inf), resets
    alike(parts(*arguments), whole(*arguments))
    alike(*(slope(*arguments) for slope in slopes))
resets = jnp.zeros((1, 16), bool).at[0, jnp.array([3, 10])].set(True)
for reverse in (False, True):
    layer = gj.GateLoopedAttention(4, heads=2, conv_size=3, gate="ring", reverse=reverse)
    params, x = layer.init(next(key)), normal(1, 16, 4)
    run = lambda axis: lambda x, resets: layer.apply(params, x, resets=resets, axis_name=axis)
    parts = jax.shard_map(run("time"), mesh=mesh, in_specs=(t, t), out_specs=t)
    close(jax.jit(parts)(x, resets), jax.jit(run(None))(x, resets))
if len(sys.argv) < 2:
    raise SystemExit(print("equal"))
model = gj.Transformer(8, num_tokens=11, depth=2, gate="ring", conv_size=3, conv_silu=True, ff_mult=0)
params, ids = model.init(next(key)), jax.random.randint(next(key), (2, 16), 0, 11)
apply = functools.partial(model.apply, return_state=True)
sharded = jax.shard_map(
    functools.partial(apply, axis_name="time"), mesh=mesh, in_specs=(P(), t), out_specs=(t, P())
)
close(jax.jit(sharded)(params, ids), apply(params, ids))
close(*(jax.jit(jax.grad(lambda params: jnp.sin(f(params, ids)[0]).sum()))(params) for f in (sharded, apply)))
print("equal")
"""

NO_TORCH = """
import sys, importlib.util
assert importlib.util.find_spec("torch") is None
import jax, jax.numpy as jnp
import gateloop_transformer, gateloop_transformer.jax as gj
from gateloop_transformer.configuration import TransformerConfig
model = gj.Transformer.of(TransformerConfig.recommended(8, 1, context=16), 11)
params = model.init(jax.random.key(0))
gj.save_model(sys.argv[1], model, params)
again, loaded = gj.load_model(sys.argv[1])
assert again == model
assert all(map(jnp.array_equal, jax.tree.leaves(params), jax.tree.leaves(loaded)))
print(gj.generate(model, params, jnp.zeros((1, 2), int), 3, temperature=0).shape)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    flags = ["-S"] if "PYTHONPATH" in environment else []
    return processes.python(*flags, "-c", code, *arguments, env=os.environ | environment)


@pytest.mark.parametrize("which", ["matrix states", pytest.param("all", marks=pytest.mark.slow)])
def test_a_sharded_time_axis_gives_what_one_device_gives(which: str) -> None:
    arguments = ["all"] if which == "all" else []
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    assert run(SHARDED, *arguments, XLA_FLAGS=flags) == "equal\n"


def test_it_works_where_torch_is_not_installed(tmp_path: Path) -> None:
    """An environment that has the JAX side's packages and no others."""
    for package in ("jax", "equinox", "safetensors", "numpy", "jaxtyping", "wadler_lindig", "typing_extensions"):
        link(tmp_path, package)
    # What JAX itself needs, whatever its version.
    for requirement in importlib.metadata.requires("jax") or []:
        if "extra" not in requirement:
            link(tmp_path, requirement.split(">")[0].split("<")[0].split("=")[0].strip())
    (tmp_path / "gateloop_transformer").symlink_to(Path(__file__).parents[2] / "gateloop_transformer")
    out = run(NO_TORCH, str(tmp_path / "model"), PYTHONPATH=str(tmp_path))
    assert out == "(1, 5)\n"


def link(folder: Path, package: str) -> None:
    """The files of an installed package, in another folder."""
    for file in importlib.metadata.files(package) or []:
        top = Path(file.parts[0])
        source = Path(str(importlib.metadata.distribution(package).locate_file(top)))
        if top.name not in ("..", "__pycache__") and not (folder / top.name).exists():
            (folder / top.name).symlink_to(source)
