"""Train a model to repeat what it saw, then let it: a sequence of digits, a separator, the same digits."""

import torch

from gateloop_transformer import Transformer

torch.manual_seed(0)
SEPARATOR, LENGTH = 10, 5
model = Transformer(dim=64, num_tokens=11, depth=2, gate="ring", gate_loop_heads=4, head_norm=True, max_memory=32)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def batch(rows: int) -> torch.Tensor:
    """Digits, separator, the same digits."""
    digits = torch.randint(0, 10, (rows, LENGTH))
    return torch.cat([digits, torch.full((rows, 1), SEPARATOR), digits], 1)


for step in range(250):
    ids = batch(64)
    logits = model(ids[:, :-1])[:, LENGTH:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, LENGTH + 1 :].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}")

test = batch(100)
copied = model.generate(test[:, : LENGTH + 1], LENGTH, temperature=0)
print(f"copied without a mistake: {(copied == test).all(1).float().mean().item():.0%}")
