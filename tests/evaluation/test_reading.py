"""`gateloop read` and `gateloop generate --state`: any text, any split, one continuation."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from gateloop_transformer.cli import main
from gateloop_transformer.evaluation import reading
from gateloop_transformer.evaluation.reading import load_reading, model_digest, read
from gateloop_transformer.runs.folder import load_model

TEXT = "".join(f"{n} times {n} is {n * n}, so ünd so.\n" for n in range(120)).encode()
MODEL = [
    *("--dim", "16", "--depth", "2", "--context", "32", "--batch", "4", "--eval-bytes", "64", "--sample-bytes", "0"),
    *("--gate-loop-heads", "4", "--conv-size", "4", "--layer-pattern", "gate attention", "--dim-head", "8"),
    *("--heads", "2", "--rotary-emb", "--attn-window", "20", "--steps", "3"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data.txt").write_bytes(TEXT)
    assert main(["train", str(folder / "data.txt"), "--out", str(folder / "run"), *MODEL]) == 0
    return folder / "run"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err


def generated(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, command), "--tokens", "30", "--temperature", "0"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_text_that_was_read_continues_as_its_prompt_would(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    content = TEXT[:1500]
    pack: Any = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    text, state = tmp_path / f"text{suffix}", tmp_path / "state"
    text.write_bytes(pack(content))
    assert main(["read", str(run), str(text), "--state", str(state), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["bytes"], said["position"]) == (1500, 1500)
    whole = generated(capsys, run, "--prompt", content.decode())
    assert content.decode() + generated(capsys, run, "--state", state) == whole
    asked = generated(capsys, run, "--prompt", content.decode() + "12 times")
    assert content.decode() + generated(capsys, run, "--state", state, "--prompt", "12 times") == asked


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [700], [20, 21, 1499]])
def test_a_text_may_be_cut_anywhere(run: Path, monkeypatch: pytest.MonkeyPatch, cuts: list[int]) -> None:
    model = load_model(run).double()
    whole = read(model, io.BytesIO(TEXT[:1500]))
    monkeypatch.setattr(reading, "_BLOCK", 64)
    part = None
    for start, end in zip([0, *cuts], [*cuts, 1500], strict=True):
        part = read(model, io.BytesIO(TEXT[start:end]), part)
    assert part is not None
    assert (part.last, part.position) == (whole.last, whole.position)
    last = torch.tensor([[whole.last]])
    expected = model(torch.tensor([list(TEXT[:1500])]))[:, -1:]
    for reached in (part, whole):
        torch.testing.assert_close(model(last, reached.state), expected, rtol=1e-9, atol=1e-9)


def test_reading_goes_on_after_a_saved_state(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, state = tmp_path / "first", tmp_path / "second", tmp_path / "state"
    first.write_bytes(TEXT[:1])
    second.write_bytes(TEXT[1:900])
    assert main(["read", str(run), str(first), "--state", str(state)]) == 0
    assert main(["read", str(run), str(second), "--state", str(state), "--after", str(state)]) == 0
    assert "read 899 bytes, 900 in all" in capsys.readouterr().out
    assert TEXT[:900].decode() + generated(capsys, run, "--state", state) == generated(
        capsys, run, "--prompt", TEXT[:900].decode()
    )
    assert load_reading(state, model_digest(run / "model.safetensors", "float32")).position == 900


def test_memory_does_not_grow_with_the_text(run: Path) -> None:
    """Blocks are of bounded size, and so is the state."""
    model, sizes, states = load_model(run), [], []
    forward = model.forward

    def watched(ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(ids.shape[1])
        return forward(ids, **options)

    model.forward = watched  # type: ignore[method-assign]
    for length in (5000, 20000):
        result = read(model, io.BytesIO((TEXT * 10)[:length]))
        assert result.state is not None
        states.append([tuple(part.shape) for layer in result.state.layers for part in layer])
    assert max(sizes) <= 2048
    assert states[0] == states[1]


def test_wrong_states_and_files_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, state, other = tmp_path / "text", tmp_path / "state", tmp_path / "other"
    text.write_bytes(TEXT[:100])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    assert main(["train", str(run.parent / "data.txt"), "--out", str(other), *MODEL, "--seed", "1"]) == 0
    assert main(["read", str(run), str(text), "--state", str(state)]) == 0
    capsys.readouterr()
    new = str(tmp_path / "new")
    refused = [
        (["read", run, text, "--state", state], "already exists: replace it with --overwrite"),
        (["read", run, tmp_path / "absent", "--state", new], "cannot read"),
        (["read", run, tmp_path / "empty", "--state", new], "the text is empty"),
        (["read", run, tmp_path / "bad.gz", "--state", new], "cannot decompress"),
        (["read", run, tmp_path, "--state", new], "is a folder"),
        (["read", run, text, "--state", tmp_path], "is a folder, not a file"),
        (["read", run, tmp_path / "absent", "--state", tmp_path / "nowhere" / "state"], "--state: there is no folder"),
        (["read", run, text, "--state", new, "--after", tmp_path / "absent"], "no state file"),
        (["read", other, text, "--state", new, "--after", state], "the state of another model"),
        (["generate", other, "--state", state], "the state of another model"),
        (["generate", run, "--state", state, "--dtype", "int8"], "read with --dtype float32, not int8"),
        (["generate", run, "--state", tmp_path / "absent"], "no state file"),
        (["generate", run, "--state", text], "damaged or not a safetensors file"),
        (["generate", run, "--state", run / "model.safetensors"], "does not hold a gate loop state"),
        (["generate", run], "give a --prompt, a --state, or both"),
    ]
    for command, message in refused:
        assert main(list(map(str, command))) == 2, command
        assert message in error_of(capsys)
    assert not Path(new).exists()
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(bytes(content))
    assert main(["generate", str(run), "--state", str(state)]) == 2
    assert "damaged" in error_of(capsys)
    assert main(["read", str(run), str(text), "--state", str(state), "--overwrite"]) == 0
    assert main(["generate", str(run), "--state", str(state), "--tokens", "3"]) == 0
