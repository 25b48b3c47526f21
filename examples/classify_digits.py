"""Read images of digits pixel by pixel: train on whole sequences in parallel, then feed one pixel at a time.

The images are the 1797 of 8 × 8 pixels that come with scikit-learn; a fifth is kept for the test. `--model gru`
trains torch's GRU of about as many parameters on the same sequences.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer import GateLoopedAttention
from gateloop_transformer.layers.feedforward import FeedForward
from gateloop_transformer.layers.norm import PreNorm, RMSNorm

DIM = 32


class GateLoopStack(nn.Module):
    """Gate loop and feed-forward in turn, with a residual around each: (B, T, DIM) and states → the same."""

    def __init__(self, depth: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        # The convolution reaches back one row of pixels, to the one above.
        options = {"gate": "ring", "head_norm": True, "qk_norm": True, "conv_size": 9, "max_memory": 64}
        mixers = [GateLoopedAttention(DIM, heads=4, **options) for _ in range(depth)]
        self.mixers = nn.ModuleList(PreNorm(DIM, mixer, dropout) for mixer in mixers)
        self.feeds = nn.ModuleList(PreNorm(DIM, FeedForward(DIM, 2), dropout) for _ in range(depth))
        self.norm = RMSNorm(DIM)

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        after = []
        for mixer, feed, state in zip(self.mixers, self.feeds, states or [None] * len(self.mixers), strict=True):
            x, state = mixer(x, state=state, return_state=True)
            x = feed(x)
            after.append(state)
        return self.norm(x), after


class Classifier(nn.Module):
    """Pixels (B, T, 1) → logits (B, 10) from the mean over all pixels so far, and the state to continue from."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.embed = nn.Linear(1, DIM)
        gru = model == "gru"
        self.layers = nn.GRU(DIM, DIM + 8, 2, batch_first=True, dropout=0.2) if gru else GateLoopStack()
        self.out = nn.Linear(DIM + 8 if gru else DIM, 10)

    def forward(self, pixels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        total, count, inner = (0, 0, None) if state is None else state
        features, inner = self.layers(self.embed(pixels), inner)
        total, count = total + features.sum(1), count + features.shape[1]
        return self.out(total / count), (total, count, inner)


def load(permuted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test sequences (N, 64, 1) and classes (N,); permuted: all pixels in one shuffled order."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        sys.exit("this example needs scikit-learn: pip install '.[examples]' in a checkout")
    digits = load_digits()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) if permuted else torch.arange(64)
    pixels = ((torch.tensor(digits.data) - 8) / 5).float()[:, order, None]
    classes = torch.tensor(digits.target)
    train, test = train_test_split(range(len(classes)), test_size=0.2, random_state=0, stratify=classes)
    return pixels[train], classes[train], pixels[test], classes[test]


def train(model: Classifier, pixels: Tensor, classes: Tensor, steps: int, rows: int = 16, lr: float = 5e-3) -> None:
    """AdamW over shuffled images, again and again; gates learn slower and do not decay, or training may collapse."""
    gates = [p for m in model.modules() if isinstance(m, GateLoopedAttention) for p in m.gate_parameters()]
    others = [p for p in model.parameters() if all(p is not gate for gate in gates)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": gates, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, lr / 5], total_steps=max(steps, 2), pct_start=0.1)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < rows:
            order = torch.randperm(len(classes))
        picked, order = order.split([rows, len(order) - rows])
        loss = F.cross_entropy(model(pixels[picked])[0], classes[picked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss.item():.3f}")


@torch.no_grad()
def classify_stream(model: Classifier, pixels: Tensor) -> Tensor:
    """Logits (B, 64, 10) after every pixel, fed one at a time as they would arrive."""
    state, outputs = None, []
    for pixel in pixels.split(1, 1):
        logits, state = model(pixel, state)
        outputs.append(logits)
    return torch.stack(outputs, 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["gateloop", "gru"], default="gateloop")
    parser.add_argument("--permuted", action="store_true", help="the pixels in a shuffled order")
    parser.add_argument("--steps", type=int, default=3500, help="of training, 16 images each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pixels, classes, test_pixels, test_classes = load(args.permuted)
    torch.manual_seed(args.seed)
    model = Classifier(args.model)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters())} parameters, {len(classes)} images to learn from")
    start = time.process_time()
    train(model, pixels, classes, args.steps)
    print(f"trained in {time.process_time() - start:.0f} s of CPU time")

    with torch.no_grad():
        whole = model.eval()(test_pixels)[0]
    right = whole.argmax(1) == test_classes
    print(f"test accuracy: {right.float().mean().item():.2%} of {len(right)} images")
    streamed = classify_stream(model, test_pixels)
    for seen in (16, 32, 48, 64):
        right = streamed[:, seen - 1].argmax(1) == test_classes
        print(f"  after {seen} pixels, fed one by one: {right.float().mean().item():.2%}")
    same = bool((streamed[:, -1].argmax(1) == whole.argmax(1)).all())
    print(f"one by one gives the classes of the whole: {same}")


if __name__ == "__main__":
    main()
