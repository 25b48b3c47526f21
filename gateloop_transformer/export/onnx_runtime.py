"""Greedy decoding with the files of `export_onnx`, by onnxruntime and NumPy alone."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateloop_transformer.files import digest
from gateloop_transformer.stored import read_json

STEP, PROMPT, DESCRIPTION = "step.onnx", "prompt.onnx", "model.json"
FORMAT = 1

State = list[npt.NDArray[Any]]


class OnnxGenerator:
    """A language model that onnxruntime computes on the CPU.

    Args:
        folder: a folder that `export_onnx` wrote.
        threads: number of threads of onnxruntime; 0: its own choice.

    Raises:
        ValueError: the folder or a file is missing, damaged or of a newer format, or onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int = 0) -> None:
        path = Path(folder)
        description = read_description(path)
        self.block: int = description["block"]
        self.vocabulary: int = description["vocabulary"]
        self.tokenizer: str | None = description["tokenizer"]
        self._parts: list[dict[str, Any]] = description["state"]
        self._step, self._prompt = (_session(path / name, threads) for name in (STEP, PROMPT))

    def start(self, batch: int) -> State:
        """The state before the first token for `batch` rows: zeros in the order of model.json."""
        sizes = {"batch": batch, "past": 0}
        return [np.zeros([sizes.get(n, n) for n in part["shape"]], part["dtype"]) for part in self._parts]

    def read(self, ids: npt.ArrayLike, state: State | None = None) -> tuple[npt.NDArray[np.float32], State]:
        """Read a prompt or what follows it, in blocks, then token by token.

        Args:
            ids: (B, T), integers, B ≥ 1 and T ≥ 1.
            state: the state that an earlier call returned; None: the start. It is not changed.

        Returns:
            Logits after the last token (B, vocabulary), and the state there.

        Raises:
            ValueError: ids have the wrong shape or dtype or are outside the vocabulary.
        """
        tokens = self._checked(ids)
        state = self.start(len(tokens)) if state is None else state
        whole = tokens.shape[1] // self.block * self.block
        edges = [*range(0, whole, self.block), *range(whole, tokens.shape[1] + 1)]
        for start, end in itertools.pairwise(edges):
            session = self._step if end - start == 1 else self._prompt
            names = ["ids", *(part["name"] for part in self._parts)]
            logits, *state = session.run(None, dict(zip(names, [tokens[:, start:end], *state], strict=True)))
        return logits[:, -1], state

    def generate(self, ids: npt.ArrayLike, max_new_tokens: int) -> npt.NDArray[np.int64]:
        """Continue each row by the likeliest token at each step.

        Args:
            ids: prompts (B, T), integers, B ≥ 1 and T ≥ 1.
            max_new_tokens: how many tokens to add.

        Returns:
            Prompts and new ids (B, T + max_new_tokens).

        Raises:
            ValueError: ids have the wrong shape or dtype or are outside the vocabulary, or max_new_tokens is negative.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        tokens = [self._checked(ids)]
        state: State | None = None
        for _ in range(max_new_tokens):
            logits, state = self.read(tokens[-1], state)
            tokens.append(logits.argmax(-1)[:, None])
        return np.concatenate(tokens, 1)

    def _checked(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        given = np.asarray(ids)
        if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer) or 0 in given.shape:
            raise ValueError(
                f"ids must be integers of shape (B, T) with B ≥ 1 and T ≥ 1, not {given.dtype} {given.shape}"
            )
        if given.min() < 0 or given.max() >= self.vocabulary:
            raise ValueError(f"ids must be in [0, {self.vocabulary}), got {given.min()} to {given.max()}")
        return given.astype(np.int64)


def read_description(folder: Path) -> dict[str, Any]:
    """Read model.json, and check that all files that it names are as they were written.

    Raises:
        ValueError: they are not, or model.json is missing, damaged or of a newer format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no exported model: it has no {DESCRIPTION}")
    try:
        description: dict[str, Any] = read_json(path)
        version = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged or describes no exported model: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{str(path)!r} is of format {version}, this library reads {FORMAT}")
    kinds = {"block": int, "files": dict, "state": list, "vocabulary": int}
    missing = [name for name, kind in kinds.items() if type(description.get(name)) is not kind]
    if missing or "tokenizer" not in description:
        raise ValueError(f"{str(path)!r} is damaged: it lacks {', '.join(missing or ['tokenizer'])}")
    for name in (STEP, PROMPT, *description["files"]):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{str(file)!r} is missing")
        if digest(file) != description["files"].get(name):
            raise ValueError(f"{str(file)!r} is damaged, or of another model than {DESCRIPTION}")
    return description


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("onnxruntime is not installed; `pip install gateloop-transformer[export]`") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Only errors are logged; other messages are about onnxruntime's own optimisations.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
