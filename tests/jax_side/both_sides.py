"""The same computation in torch and in JAX: values and gradients from tensors, returned as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from cases import weights
from torch import Tensor


def to_jax(x: Any) -> Any:
    """Tensors in any nesting of tuples and dictionaries as arrays."""
    if isinstance(x, Tensor):
        return jnp.asarray(x.detach().numpy())
    if isinstance(x, dict):
        return {name: to_jax(value) for name, value in x.items()}
    return tuple(map(to_jax, x)) if isinstance(x, tuple | list) else x


def to_torch(x: Any) -> Tensor:
    """An array as a tensor."""
    return torch.from_numpy(np.array(x))


def real_parts(x: Any) -> Any:
    """A complex array as reals with a last dimension of two."""
    return jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x


def values_and_slopes(function: Callable[..., Any], tensors: Sequence[Tensor], compiled: bool = True) -> list[Tensor]:
    """What `cases.values_and_gradients` gives, computed by a function of JAX arrays."""

    def loss(*arrays: Any) -> Any:
        outputs = [real_parts(x) for x in jax.tree.leaves(function(*arrays))]
        total = sum((x.astype(jnp.float64) * to_jax(weights(torch.empty(x.shape)))).sum() for x in outputs)
        return total, outputs

    both = jax.grad(loss, argnums=tuple(range(len(tensors))), has_aux=True)
    slopes, outputs = (jax.jit(both) if compiled else both)(*to_jax(tuple(tensors)))
    # Of a complex argument JAX gives the conjugate of what torch gives.
    return [to_torch(x) for x in [*outputs, *(real_parts(jnp.conj(slope)) for slope in slopes)]]
