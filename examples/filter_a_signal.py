"""Clean a noisy signal online: train on windows in parallel, then filter one sample at a time in constant memory.

The signal is a sum of sinusoids whose frequencies drift and, now and then, jump. The filter learns from noisy windows
and their clean originals, and is compared with two classical ones that are fitted on the same windows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer import GateLoopedAttention
from gateloop_transformer.layers.feedforward import FeedForward
from gateloop_transformer.layers.norm import PreNorm, RMSNorm
from gateloop_transformer.layers.state import GateLoopState
from gateloop_transformer.pictures import empty_figure

States = tuple[GateLoopState, ...]


class Filter(nn.Module):
    """Samples (B, T, 1) → estimates (B, T, 1), each from the samples up to its own."""

    def __init__(self, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(1, dim)
        options = {"gate": "ring", "head_norm": True, "qk_norm": True, "conv_size": 8, "max_memory": 128}
        self.mixers = nn.ModuleList(PreNorm(dim, GateLoopedAttention(dim, heads=4, **options)) for _ in range(depth))
        self.feeds = nn.ModuleList(PreNorm(dim, FeedForward(dim, 2)) for _ in range(depth))
        self.out = nn.Sequential(RMSNorm(dim), nn.Linear(dim, 1))

    def forward(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Estimates, and the states to continue from."""
        x = self.embed(x)
        after = []
        for mixer, feed, state in zip(self.mixers, self.feeds, states or [None] * len(self.mixers), strict=True):
            x, state = mixer(x, state=state, return_state=True)
            x = feed(x)
            after.append(state)
        return self.out(x), tuple(after)


def make_signals(rows: int, steps: int, waves: int = 2, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Noisy and clean signals (rows, steps, 1). All waves change at once, every 300 steps on average."""
    changes = torch.rand(rows, steps) < 1 / 300
    last_change = torch.where(changes, torch.arange(steps), 0).cummax(1).values
    drawn = torch.rand(rows, steps, 2, waves)
    held = drawn.gather(1, last_change[:, :, None, None].expand_as(drawn))
    drift = torch.exp(0.005 * torch.randn(rows, steps, waves).cumsum(1))
    frequency = 0.01 * 20 ** held[:, :, 0] * drift  # cycles per step, at first 0.01 to 0.2
    clean = ((0.5 + held[:, :, 1]) * torch.sin(2 * math.pi * frequency.cumsum(1))).sum(-1, keepdim=True)
    return clean + noise * torch.randn_like(clean), clean


def train(model: Filter, noisy: Tensor, clean: Tensor, steps: int, rows: int = 8, lr: float = 5e-3) -> None:
    """Mean squared error on random rows of the windows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        picked = torch.randint(len(noisy), (rows,))
        loss = F.mse_loss(model(noisy[picked])[0], clean[picked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"step {step + 1}: error {loss.sqrt().item():.3f}")


def lagged(noisy: Tensor, taps: int) -> Tensor:
    """The last `taps` samples at every step (rows, steps, taps), zeros before the start."""
    return F.pad(noisy[..., 0], (taps - 1, 0)).unfold(1, taps, 1)


def linear_filter(noisy: Tensor, clean: Tensor, taps: int) -> Tensor:
    """The weights (taps, 1) of the causal linear filter with the least squared error."""
    past = lagged(noisy, taps).flatten(0, 1).double()
    return torch.linalg.solve(past.T @ past, past.T @ clean.flatten(0, 1).double()).float()


def smooth(noisy: Tensor, alpha: float) -> Tensor:
    """Exponential smoothing: y[t] = y[t-1] + alpha (x[t] - y[t-1])."""
    y, outputs = torch.zeros_like(noisy[:, 0]), []
    for x in noisy.unbind(1):
        y = y + alpha * (x - y)
        outputs.append(y)
    return torch.stack(outputs, 1)


@torch.no_grad()
def filter_stream(model: Filter, samples: Tensor) -> tuple[Tensor, States]:
    """Samples (T, 1) through the filter, one at a time, as they would arrive."""
    states, outputs = None, []
    for sample in samples:
        y, states = model(sample[None, None], states)
        outputs.append(y[0, 0])
    return torch.stack(outputs), states


def rms(estimate: Tensor, clean: Tensor) -> float:
    return (estimate - clean).square().mean().sqrt().item()


def size(states: States) -> int:
    """Bytes."""
    return sum(part.numel() * part.element_size() for state in states for part in state)


def plot(file: str, signals: dict[str, Tensor]) -> None:
    """The first 500 samples of the first signal."""
    axes = empty_figure(12, 4).add_subplot()
    for name, signal in signals.items():
        axes.plot(signal[0, :500, 0], label=name, linewidth=0.5 if name == "noisy" else 1.5)
    axes.legend()
    axes.figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1250, help="of training")
    parser.add_argument("--window", type=int, default=256, help="samples per training window")
    parser.add_argument("--samples", type=int, default=4096, help="of each of the 16 test signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draw the first 500 samples of a test signal; needs matplotlib")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    noisy, clean = make_signals(2048, args.window)
    test_noisy, test_clean = make_signals(16, args.samples)
    model = Filter()
    print(f"filter: {sum(p.numel() for p in model.parameters())} parameters")
    train(model, noisy, clean, args.steps)

    with torch.no_grad():
        whole = model.eval()(test_noisy)[0]
    weights = linear_filter(noisy, clean, 64)
    alpha = min((n / 20 for n in range(1, 20)), key=lambda a: rms(smooth(noisy, a), clean))
    estimates = {
        "nothing done": test_noisy,
        f"exponential smoothing ({alpha})": smooth(test_noisy, alpha),
        "linear filter, 64 taps": lagged(test_noisy, 64) @ weights,
        "gate loop": whole,
    }
    print(f"RMS error over {test_clean.numel()} test samples:")
    for name, estimate in estimates.items():
        print(f"  {name:28} {rms(estimate, test_clean):.3f}")

    _, first = filter_stream(model, test_noisy[0, :10])
    start = time.perf_counter()
    streamed, last = filter_stream(model, test_noisy[0])
    each = (time.perf_counter() - start) / len(streamed)
    print(f"one sample at a time: {each * 1e6:.0f} µs each on this machine")
    print(f"state: {size(first)} bytes after 10 samples, {size(last)} after {len(streamed)}")
    print(f"largest difference to the whole: {(streamed - whole[0]).abs().max().item():.1e}")
    if args.plot:
        plot(args.plot, {"noisy": test_noisy, "gate loop": whole, "clean": test_clean})


if __name__ == "__main__":
    main()
