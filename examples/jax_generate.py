"""Write text with a trained byte model in JAX: the prompt at once, then one byte after the other in `lax.scan`.

python examples/jax_generate.py FOLDER [PROMPT] [BYTES]      FOLDER as `gateloop train --out` or jax_train.py leave it
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.jax import Transformer, load_model

if len(sys.argv) > 1:
    model, params = load_model(sys.argv[1])
else:
    model = Transformer.of(TransformerConfig.recommended(32, 2))
    params = model.init(jax.random.key(0))
prompt = sys.argv[2] if len(sys.argv) > 2 else "The "
count = int(sys.argv[3]) if len(sys.argv) > 3 else 100
ids = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8).astype(np.int32))[None]


@jax.jit
def write(params, ids, key):
    logits, state = model.apply(params, ids, return_state=True)

    def step(carried, key):
        logits, state = carried
        token = jax.random.categorical(key, logits / 0.8)
        logits, state = model.apply(params, token[:, None], state, return_state=True)
        return (logits[:, -1], state), token

    _, tokens = jax.lax.scan(step, (logits[:, -1], state), jax.random.split(key, count))
    return tokens[:, 0]


# The state is as large after a million bytes as after one. `gateloop_transformer.jax.generate` does the same.
tokens = np.asarray(write(params, ids, jax.random.key(0))).astype(np.uint8)
print(prompt + tokens.tobytes().decode(errors="replace"))
