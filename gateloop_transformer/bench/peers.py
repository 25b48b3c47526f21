"""Peers in an environment of their own, run there by `peer_server.py` and timed in turn with our candidates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gateloop_transformer.stored import parse_json


class PeerFailed(RuntimeError):
    """A peer could not be built or run; the message is its own."""


class Peer:
    """A process in the peers' environment that holds the candidates to time in turn.

    Args:
        python: the environment's interpreter.
    """

    def __init__(self, python: Path) -> None:
        server = Path(__file__).with_name("peer_server.py")
        # Python runs isolated (-I), so that `gateloop_transformer` is the one installed there.
        command = [str(python), "-I", str(server), str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self._made = 0

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed("the process ended")
        answer: dict[str, Any] = parse_json(line, "what a peer said")
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def make(
        self, what: str, shape: tuple[int, int, int], dtype: str, backward: bool, **options: Any
    ) -> Callable[[], float]:
        """Build a candidate; the result runs it once and returns the seconds that it took.

        Raises:
            PeerFailed: it could not be built.
        """
        self._ask({"make": {"what": what, "shape": shape, "dtype": dtype, "backward": backward, "options": options}})
        number, self._made = self._made, self._made + 1
        return lambda: float(self._ask({"run": number})["seconds"])

    def clear(self) -> None:
        """Forget what was made, to free memory for what comes next."""
        self._ask({"clear": True})
        self._made = 0

    def close(self) -> None:
        """End the process."""
        # This closes the pipes; the process ends with its input.
        self._process.communicate(timeout=60)
