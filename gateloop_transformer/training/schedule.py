"""The learning rate as a function of the fraction of a run that is done."""

from __future__ import annotations

import math

from gateloop_transformer.runs.config import TrainingConfig


def learning_rate(config: TrainingConfig, done: float) -> float:
    """The learning rate where the fraction `done` of the run, 0 to 1, is behind.

    All schedules rise linearly from 0 to the peak during `warmup`. Then "cosine" falls along half a cosine to
    min_lr · peak at the end of the run; "wsd" (warm-up, stable, decay) stays at the peak and falls as 1 - √x to
    min_lr · peak during the last `decay` of the run; "constant" stays at the peak.

    Args:
        config: of the training.
        done: beyond 1 counts as 1.

    Source: Hu et al., MiniCPM (2024), arXiv 2404.06395, section 4 (wsd); Hägele et al., Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations (2024), arXiv 2405.18392, section 3 (1 - √x).

    >>> wsd = TrainingConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup=0.1, decay=0.2)
    >>> [round(learning_rate(wsd, done), 6) for done in (0.05, 0.1, 0.8, 0.85, 1.0)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    done = min(1.0, done)
    if done < config.warmup:
        return config.lr * done / config.warmup
    return config.lr * (config.min_lr + (1 - config.min_lr) * _above_least(config, done))


def _above_least(config: TrainingConfig, done: float) -> float:
    """How far from min_lr to the peak: 1 right after the warm-up, 0 at the end of a falling schedule."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        return 1.0 - math.sqrt(max(0.0, 1.0 - (1.0 - done) / config.decay))
    return 0.5 * (1.0 + math.cos(math.pi * (done - config.warmup) / (1.0 - config.warmup)))
