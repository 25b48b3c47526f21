"""The original's JAX module under its name: its fields, and its formulas on this package's operators."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gateloop_transformer import gateloop_transformer_jax as original


def close(x: jax.Array, expected: jax.Array, tolerance: float = 1e-5) -> None:
    assert x.shape == expected.shape
    assert np.abs(np.asarray(x) - np.asarray(expected)).max() <= tolerance * max(1.0, float(jnp.abs(expected).max()))


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5)], ids=str)
def test_the_operator_scans_axis_1(shape: tuple[int, ...]) -> None:
    k, v, q, size, phase = jax.random.normal(jax.random.key(0), (5, *shape))
    a = jax.nn.sigmoid(size) * jnp.exp(1j * phase)
    state, y = jnp.zeros_like(a[:, 0]), []
    for t in range(shape[1]):
        state = a[:, t] * state + k[:, t] * v[:, t]
        y.append(q[:, t] * state.real)
    close(original.gate_loop_operator(k, v, q, a), jnp.stack(y, 1))


def test_the_model_has_the_fields_of_the_original_and_its_numbers_from_a_key() -> None:
    """The first two of four arrays, recorded with the original in JAX's usual precision."""
    jax.config.update("jax_enable_x64", False)
    model = original.GateLoopTransformer(num_tokens=3, dim=2, depth=1, key=jax.random.PRNGKey(0), ff_mult=1)
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    assert {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths} == {
        ".embedding": (3, 2),
        ".norm.gamma": (2,),
        ".layers[0][0].norm.gamma": (2,),
        **{f".layers[0][0].w{name}": (2, 4 if name == "a" else 2) for name in "qkvago"},
        ".layers[0][1].norm.gamma": (2,),
        ".layers[0][1].proj_in.weight": (2, 2),
        ".layers[0][1].proj_in.bias": (2,),
        ".layers[0][1].proj_out.weight": (2, 2),
        ".layers[0][1].proj_out.bias": (2,),
    }
    mixer, feed_forward = model.layers[0]
    found = [model.embedding, mixer.wa, feed_forward.proj_in.weight, feed_forward.proj_in.bias]
    first = [number for array in found for number in array.ravel()[:2].tolist()]
    recorded = [0.032453, 0.040505, -0.621944, 0.624804, 1.004014, -0.906337, -2.442456, -2.035681]
    assert np.allclose(first, recorded, atol=2e-6)


def test_the_model_is_its_formula() -> None:
    model = original.GateLoopTransformer(num_tokens=7, dim=4, depth=1, key=jax.random.key(1))
    ids = jnp.arange(12).reshape(2, 6) % 7
    (mixer, feed_forward), x = model.layers[0], model.embedding[ids]

    def norm(x: jax.Array) -> jax.Array:
        return 2 * x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-5)

    z = norm(x)
    real, imaginary = jnp.split(z @ mixer.wa, 2, -1)
    gates = jax.nn.sigmoid(jnp.hypot(real, imaginary)) * jnp.exp(1j * jnp.arctan2(imaginary, real))
    y = original.gate_loop_operator(z @ mixer.wk, z @ mixer.wv, z @ mixer.wq, gates)
    x = x + (y * jax.nn.silu(z @ mixer.wg)) @ mixer.wo
    inner = norm(x) @ feed_forward.proj_in.weight + feed_forward.proj_in.bias
    x = x + jax.nn.gelu(inner) @ feed_forward.proj_out.weight + feed_forward.proj_out.bias
    close(model(ids), norm(x) @ model.embedding.T)
