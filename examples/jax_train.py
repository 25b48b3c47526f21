"""Train a byte model in JAX on text, its state carried from window to window, in one `lax.scan` of steps.

python examples/jax_train.py [TEXT] [FOLDER] [STEPS]      FOLDER is read by gateloop_transformer.load_model too
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.jax import Transformer, parameter_groups, save_model

text = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else b"The quick brown fox jumps over the lazy dog. " * 400
folder, steps = sys.argv[2] if len(sys.argv) > 2 else None, int(sys.argv[3]) if len(sys.argv) > 3 else 100
rows, context, rate = 4, 64, 6e-3

model = Transformer.of(TransformerConfig.recommended(64, 2, context=context))
params = model.init(jax.random.key(0))
schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 20 + 1, steps + 1, rate / 10)
# Gates learn at half the rate; only matrices decay.
kinds = {
    "matrix": optax.adamw(schedule, b2=0.99, weight_decay=0.1),
    "other": optax.adam(schedule, b2=0.99),
    "gate": optax.adam(lambda step: schedule(step) / 2, b2=0.99),
    "fixed": optax.set_to_zero(),
}
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(kinds, parameter_groups(params)))

# Each row reads a part of the text of its own from one end to the other, and starts again.
part = np.frombuffer(text, np.uint8)[: len(text) // rows * rows].reshape(rows, -1)
places = np.arange(steps)[:, None] * context + np.arange(context + 1)
windows = jnp.asarray(part[:, places % part.shape[1]].transpose(1, 0, 2).astype(np.int32))


def step(carried, ids):
    params, moments, state = carried
    loss = jax.value_and_grad(lambda params: model.loss(params, ids, state, return_state=True), has_aux=True)
    (nats, state), slopes = loss(params)
    changes, moments = optimizer.update(slopes, moments, params)
    return (optax.apply_updates(params, changes), moments, state), nats


_, state = model.apply(params, windows[0, :, :0], return_state=True)
run = jax.jit(lambda *carried: jax.lax.scan(step, carried, windows))
(params, _, state), nats = run(params, optimizer.init(params), state)
first, last = (float(part.mean()) / np.log(2) for part in (nats[:5], nats[-5:]))
print(f"bits per byte: {first:.2f} at first, {last:.2f} at last")
if folder:
    save_model(folder, model, params)
