"""Images of digits, read pixel by pixel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gateloop_transformer.configuration import option
from gateloop_transformer.tasks.task import NONE, Batch, Ids, Task

_PIXELS, _LEVELS = 64, 17


@functools.cache
def _images() -> tuple[Ids, Ids, Ids, Ids]:
    """Load pixels (N, 64) and classes (N,) to learn from, then those of the test, which is a random fifth.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("scikit-learn is not installed; `pip install gateloop-transformer[science]`") from error
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, classes = pixels[order].astype(np.int64), classes[order].astype(np.int64)
    held = len(pixels) // 5
    return pixels[held:], classes[held:], pixels[:held], classes[:held]


@dataclass(frozen=True)
class SequentialDigits(Task):
    """The digit that the 64 pixels of an image are, read row by row.

    Tokens: the 17 levels of grey of the 1,797 images of 8 × 8 pixels that come with scikit-learn. The class is asked at
    the last pixel. A random fifth of the images, always the same, is the test; the others are drawn with replacement.

    Source: Alpaydin, Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998).
    """

    name: ClassVar[str] = "digits"
    summary: ClassVar[str] = "scikit-learn's images of digits, pixel by pixel"
    least: ClassVar[int] = _PIXELS
    trained: ClassVar[int] = _PIXELS
    grows: ClassVar[bool] = False
    tested: ClassVar[tuple[int, ...]] = (_PIXELS,)
    settings: ClassVar[dict[str, Any]] = {
        "dim": 32,
        "gate_loop_heads": 4,
        "conv_size": 9,
        "qk_norm": True,
        "max_memory": 64.0,
        "dropout": 0.2,
        "least_rows": 32,
        "steps": 1500,
        "lr": 2e-2,
        "weight_decay": 0.3,
    }

    @property
    def vocabulary(self) -> int:
        """The levels of grey."""
        return _LEVELS

    @property
    def answers(self) -> int:
        """The classes."""
        return 10

    @property
    def order(self) -> Ids:
        """The order in which pixels are read (64,)."""
        return np.arange(_PIXELS)

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw images to learn from; their length is 64."""
        self.check(rows, length)
        pixels, classes, _, _ = _images()
        drawn = rng.integers(0, len(pixels), rows)
        return self._asked(pixels[drawn], classes[drawn])

    def test_batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Return all images of the test, whatever the number of rows."""
        self.check(rows, length)
        return self._asked(*_images()[2:])

    def check(self, rows: int, length: int) -> None:
        """Check that the task has batches of that length.

        Raises:
            ValueError: it has not.
        """
        super().check(rows, length)
        if length != _PIXELS:
            raise ValueError(f"{self.name}: images have a length of {_PIXELS}, not {length}")

    def _asked(self, pixels: Ids, classes: Ids) -> Batch:
        targets = np.full(pixels.shape, NONE, dtype=np.int64)
        targets[:, -1] = classes
        return Batch(pixels[:, self.order], targets)


@dataclass(frozen=True)
class PermutedDigits(SequentialDigits):
    """The task of `SequentialDigits` with the pixels of all images in one random order."""

    name: ClassVar[str] = "permuted-digits"
    summary: ClassVar[str] = "the same, all pixels in one random order"
    order_seed: int = option(0, "which random order")

    @property
    def order(self) -> Ids:
        """The order in which pixels are read (64,)."""
        return np.random.default_rng(self.order_seed).permutation(_PIXELS)
