"""Files of a run that are damaged or made to harm, and links in its folder: one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gateloop_transformer import load_model, numpy_runtime
from gateloop_transformer.cli import main
from gateloop_transformer.evaluation.reading import load_reading
from gateloop_transformer.layers.state import save_state
from gateloop_transformer.runs import checkpoint, folder

TINY = [
    *("--dim", "16", "--depth", "2", "--gate-loop-heads", "4", "--context", "32", "--batch", "2", "--steps", "2"),
    *("--eval-bytes", "64", "--sample-bytes", "0", "--checkpoint-every", "1"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(300)))
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(text), "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run of two steps, to be harmed."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


def test_no_byte_of_the_weights_may_change(run: Path) -> None:
    path = run / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    # The header's length, the checksum, the first and the last numbers; the names of tensors; the key of the checksum.
    places = [0, 9, whole.index(b"sha256") + 12, 8 + header, len(whole) // 2, len(whole) - 1, whole.index(b"to_qkv")]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"run/model\.safetensors' (is damaged|does not fit)"):
            load_model(run)
        with pytest.raises(ValueError, match="holds no model that can be read"):
            numpy_runtime.Model(run)
    path.write_bytes(whole)
    load_model(run)
    numpy_runtime.Model(run)


def test_every_command_looks_at_the_checksum(run: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 64]) + whole[-4:])
    out = str(run.parent / "out")
    for command in (
        ["generate", str(run), "--prompt", "a"],
        ["eval", str(run), str(text)],
        ["read", str(run), str(text), "--state", out],
        ["inspect", str(run), "--text", "abc", "--out", out],
        ["export", str(run), "--format", "torch", "--out", out],
    ):
        assert main(command) == 2
        assert "model.safetensors' is damaged: its content does not have the checksum" in error_of(capsys)
        assert not Path(out).exists()
    # The checkpoints are whole: the run goes on, and publishes what it has.
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert path.read_bytes() == whole


def test_what_a_tool_has_written_anew_has_no_checksum_and_is_read(run: Path) -> None:
    path = run / "model.safetensors"
    tensors = load_file(path)
    tensors["token_emb.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})
    assert not load_model(run).token_emb.weight.any()
    numpy_runtime.Model(run)


HUGE: list[tuple[dict[str, Any], str]] = [
    ({"depth": 10**6}, "has 2 layers, not 1000000"),
    ({"depth": 10**30}, "has 2 layers, not 1"),
    ({"depth": 1}, "has 2 layers, not 1"),
    ({"dim": 10**9}, "does not fit"),
    ({"ff_mult": 10**7}, "does not fit config.json"),
    ({"dim_gate_looped_attn": 10**12}, "does not fit"),
    ({"conv_size": 10**9}, "does not fit config.json"),
    ({"gate_rank": 10**8}, "does not fit config.json"),
    ({"use_gate_looped_attn": False, "heads": 10**8}, "does not fit config.json"),
    ({"layer_pattern": "gate " * 10**5}, "layer_pattern"),
]


@pytest.mark.parametrize(("model", "problem"), HUGE, ids=[next(iter(model)) for model, _ in HUGE])
def test_sizes_are_those_of_the_weights_before_anything_is_built(
    run: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], problem: str
) -> None:
    values = json.loads((run / "config.json").read_text())
    values["model"] |= model
    (run / "config.json").write_text(json.dumps(values))
    began = time.process_time()
    for command in (["generate", str(run), "--prompt", "a"], ["train", "--out", str(run), "--resume"]):
        assert main(command) == 2
        assert problem in (error := error_of(capsys))
        assert str(run) in error
    # What these ask for takes minutes and more memory than there is.
    assert time.process_time() - began < 5


@pytest.mark.parametrize("harm", ["[" * 100_000, '{"format": ' + "1" * 5000 + "}", "", "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_read_is_named(run: Path, capsys: pytest.CaptureFixture[str], name: str, harm: str) -> None:
    (run / "model.safetensors").unlink()
    (run / name).write_bytes(harm.encode("utf-8", "surrogateescape"))
    assert main(["generate", str(run), "--prompt", "a"]) == 2
    assert f"{name}' is not " in error_of(capsys)


@pytest.mark.parametrize(
    "files",
    ["model.safetensors.index.json", "../model.safetensors", "config.json", "/etc/passwd", 3, {}],
)
def test_an_index_names_weights_beside_it(run: Path, capsys: pytest.CaptureFixture[str], files: Any) -> None:
    (run / "model.safetensors").unlink()
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": files}}))
    assert main(["generate", str(run), "--prompt", "a"]) == 2
    assert "model.safetensors.index.json' is no index of weights" in error_of(capsys)


@pytest.mark.parametrize(
    "harm", [{"step": None}, {"step": 2.5}, {"bits_per_byte": "low"}, {"wings": 2}, [], {"seconds": True}]
)
def test_progress_is_what_a_checkpoint_says(run: Path, harm: Any) -> None:
    path = run / "checkpoints" / "step-000000002"
    values = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**values, **harm} if isinstance(harm, dict) else harm))
    assert checkpoint.score(path) == float("inf")


def test_a_state_says_what_it_needs_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gateloop_transformer.layers.state import TransformerState, describe_state, load_state

    path = tmp_path / "state"
    save_state(TransformerState(()), path, {"model": "abc", "last": "x", "position": "1"})
    with pytest.raises(ValueError, match="state' is damaged: it does not say how far it has read"):
        load_reading(path, "abc float32")
    from gateloop_transformer.stored import UNSEALED, seal

    parts = {"format": "gateloop-state", "version": "2", "kind": '"GateLoopState"', "about": "{}"}
    changes: list[dict[str, str | None]] = [
        *({"about": None}, {"about": "[" * 100_000}, {"about": "[]"}, {"about": '{"a": 1}'}),
        *({"kind": None}, {"kind": "5"}, {"kind": "[[]]"}, {"kind": '["GateLoopState"]'}, {"kind": '"Other"'}),
    ]
    for change in changes:
        metadata = {name: value for name, value in {**parts, **change}.items() if value is not None}
        save_file({"real": torch.zeros(1)}, path, {**metadata, **UNSEALED})
        with path.open("r+b") as file:
            seal(file)
        with pytest.raises(ValueError, match=rf"{path}' is "):
            (describe_state if "about" in change else load_state)(path)


def test_a_linked_folder_stays_a_link_and_its_checkpoints_are_replaced(run: Path, text: Path) -> None:
    disk = run.parent / "disk"
    for name in ("checkpoints", "tensorboard"):
        (run / name).mkdir(exist_ok=True)
        shutil.move(run / name, disk / name)
        (run / name).symlink_to(disk / name)
    (disk / "checkpoints" / "mine.txt").write_text("of a user")
    (disk / "tensorboard" / "events.out.tfevents.1").write_bytes(b"")
    elsewhere = run.parent / "kept.safetensors"
    (run / "model.safetensors").rename(elsewhere)
    (run / "model.safetensors").symlink_to(elsewhere)
    kept = elsewhere.read_bytes()
    link = run.parent / "link"
    link.symlink_to(run)
    for steps in ("1", "3"):
        assert (
            main(["train", str(text), "--out", str(link), *TINY, "--steps", steps, "--keep", "1", "--overwrite"]) == 0
        )
        assert (run / "checkpoints").is_symlink()
        assert sorted(os.listdir(disk / "checkpoints")) == ["mine.txt", f"step-00000000{steps}"]
        assert (run / "tensorboard").is_symlink()
        assert not (disk / "tensorboard" / "events.out.tfevents.1").exists()
    # What a linked file leads to may be another's.
    assert elsewhere.read_bytes() == kept
    assert not (run / "model.safetensors").is_symlink()


def test_nothing_is_deleted_where_something_cannot_be(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> list[str]:
        return sorted(str(path) for path in run.rglob("*"))

    closed, before = run / "checkpoints" / "step-000000002", files()
    real = os.access
    # As it is where a folder was made read-only, for those who may not write there all the same.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and real(path, mode))
    assert main(["train", str(text), "--out", str(run), *TINY, "--overwrite"]) == 2
    assert "step-000000002' cannot be deleted, and nothing was" in error_of(capsys)
    assert files() == before


def test_a_link_that_leads_nowhere_is_said_before_anything_is_done(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(run.parent / "unmounted")
    for how in (["--resume"], [str(text), *TINY, "--overwrite"]):
        assert main(["train", "--out", str(run), *how]) == 2
        assert "checkpoints' is a link to" in error_of(capsys)
    assert (run / "model.safetensors").exists()


def test_an_empty_folder_for_checkpoints_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    folder.check_contents(tmp_path / "run", resume=False, overwrite=False)


def test_a_folder_whose_name_is_no_text_is_as_good(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / os.fsdecode(b"r\xffn $x$")
    shutil.copytree(finished, odd)
    assert main(["train", "--out", str(odd), "--resume", "--steps", "3", "--track", "none"]) == 0
    assert main(["generate", str(odd), "--prompt", "a", "--tokens", "1"]) == 0
    assert main(["plot", str(odd), "--out", str(tmp_path / os.fsdecode(b"\xff.png"))]) == 0
    assert main(["export", str(odd), "--format", "torch", "--out", str(odd)]) == 0
    capsys.readouterr()
    pytest.importorskip("tensorboard")
    assert main(["train", str(text), "--out", f"{odd}2", *TINY]) == 2
    assert "TensorBoard takes no folder whose name is no text" in error_of(capsys)
    assert not Path(f"{odd}2").exists()
