"""The runtime in NumPy alone gives the model's tokens, from every form of folder."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from models import ATTENTION, GATES
from options import build, config
from safetensors.torch import save_file

from gateloop_transformer import Transformer, TransformerConfig, numpy_runtime
from gateloop_transformer.numpy_runtime import FIELDS, OTHERS, Model
from gateloop_transformer.runs.config import FORMAT, RunConfig, TokenizerConfig
from gateloop_transformer.runs.folder import publish, write_config

PROMPT = [7, 77, 177, 250, 3]


def save(folder: Path, name: str, model: Transformer) -> Path:
    """As `gateloop train` does."""
    run = RunConfig(config(name))
    write_config(folder, run)
    publish(folder, model.state_dict(), run)
    return folder


def save_flat(folder: Path, name: str, model: Transformer, dtype: torch.dtype = torch.float32) -> Path:
    """As transformers does, in two files."""
    fields = {"model_type": "gateloop", "vocab_size": 256, "torch_dtype": "float32", **vars(config(name))}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = [(f"model.{name}", tensor.to(dtype)) for name, tensor in model.state_dict().items()]
    places = {}
    for number, half in enumerate((tensors[::2], tensors[1::2])):
        file = f"model-{number}.safetensors"
        save_file(dict(half), folder / file)
        places |= {name: file for name, _ in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@torch.no_grad()
def assert_same(model: Transformer, folder: Path, tolerance: float = 1e-4) -> None:
    runtime = Model(folder)
    expected = model(torch.tensor([PROMPT]))[0]
    logits = np.stack([runtime.step(token) for token in PROMPT])
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=tolerance)
    assert logits.dtype == np.float32
    tokens = model.generate(torch.tensor([PROMPT]), 12, temperature=0)[0, len(PROMPT) :]
    assert runtime.generate(PROMPT, 12) == tokens.tolist()


@pytest.mark.parametrize("name", [*GATES, *ATTENTION, "pattern"])
def test_logits_and_tokens_are_the_models(name: str, tmp_path: Path) -> None:
    model = build(name, 256)
    assert_same(model, save(tmp_path, name, model))


def test_long_memories_keep_their_digits(tmp_path: Path) -> None:
    model = build("two heads", 256)
    with torch.no_grad():
        for block in model.layers:
            block[0].fn.ring_logit.fill_(12.0)  # type: ignore[index,operator,union-attr]
    assert_same(model, save(tmp_path, "two heads", model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_folder_of_transformers_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("pattern", 256)
    folder = save_flat(tmp_path, "pattern", model, dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    assert_same(model, folder)


def test_every_field_of_a_config_is_known() -> None:
    fields = {item.name: item.default for item in dataclasses.fields(TransformerConfig)}
    assert fields.keys() == FIELDS.keys() | OTHERS
    assert {name: fields[name] for name in FIELDS} == FIELDS
    assert numpy_runtime.FORMAT == FORMAT


def test_the_file_alone_writes_the_text(tmp_path: Path) -> None:
    model = build("pattern", 256)
    folder = save(tmp_path, "pattern", model)
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['gateloop_transformer'] = None; "
        f"sys.argv[0] = 'numpy_runtime'; runpy.run_path({numpy_runtime.__file__!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(folder), "--tokens", "20"]
    prompt = "Zwölf"
    expected = model.generate(torch.tensor([list(prompt.encode())]), 20, temperature=0)[0].tolist()
    done = processes.run([*command, "--prompt", prompt])
    assert done.stdout == bytes(expected).decode(errors="replace") + "\n"
    assert (done.returncode, done.stderr) == (0, "")
    ids = ",".join(map(str, prompt.encode()))
    done = processes.run([*command, "--ids", ids])
    assert done.stdout == ",".join(map(str, expected[len(prompt.encode()) :])) + "\n"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["numpy_runtime", *map(str, arguments)])
    return numpy_runtime.main()


def test_text_for_tokens_that_are_no_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("polar", 300)
    run = RunConfig(config("polar"), tokenizer=TokenizerConfig("bpe", 300, "0" * 64))
    write_config(tmp_path, run)
    publish(tmp_path, model.state_dict(), run)
    assert command(monkeypatch, tmp_path, "--prompt", "text") == 2
    errors = capsys.readouterr().err
    assert errors == (
        "numpy_runtime: error: the model's tokens are not bytes: encode the text by its tokenizer and give --ids\n"
    )
    assert command(monkeypatch, tmp_path, "--ids", "299,0", "--tokens", 2) == 0
    assert command(monkeypatch, tmp_path, "--ids", "300", "--tokens", 2) == 2
    assert "tokens must be in [0, 300), not 300" in capsys.readouterr().err


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["model"].update(changes.pop("model", {}))
    path.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "Expecting"),
        (lambda folder: (folder / "config.json").write_text("[]"), "list"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json is not a GateLoop model's"),
        (lambda folder: _change(folder, format=FORMAT + 1), "is of another format"),
        (lambda folder: _change(folder, format=FORMAT - 1), "is of another format"),
        (lambda folder: _change(folder, model={"later": 1}), "fields that this file does not know: later"),
        (lambda folder: _change(folder, model={"data_dependent_rel_pos": "gate_loop"}), "is not implemented here"),
        (lambda folder: _change(folder, model={"layer_pattern": "gate other"}), "'other'"),
        (lambda folder: _change(folder, model={"gate": "ring"}), "ring_logit"),
        (lambda folder: _change(folder, model={"gate_loop_heads": 5}), "reshape"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "buffer"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8]),
            "checksum",
        ),
    ],
)
def test_damage_is_one_clear_error(harm: Callable[[Path], Any], problem: str, tmp_path: Path) -> None:
    folder = save(tmp_path, "polar heads", build("polar heads", 256))
    harm(folder)
    with pytest.raises(ValueError, match=rf"holds no model that can be read: .*{problem}"):
        Model(folder)


def test_tokens_are_written_as_they_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pipe = save(tmp_path, "polar", build("polar", 256)), io.BytesIO()
    seen = []

    def tokens(*_arguments: object) -> Iterator[int]:
        for token in "ü!".encode():
            seen.append(pipe.getvalue().decode())
            yield token

    monkeypatch.setattr(Model, "_tokens", tokens)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(pipe)))  # type: ignore[arg-type]
    assert command(monkeypatch, folder, "--prompt", "ab") == 0
    assert [*seen, pipe.getvalue().decode()] == ["ab", "ab", "abü", "abü!\n"]
