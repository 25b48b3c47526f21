"""Small models of every kind, as transformers has them."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from kinds import KINDS, build


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    """A language model of each kind, in evaluation mode."""
    return build(request.param)
