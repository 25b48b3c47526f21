"""Laws of states: transforms, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateloop_transformer import Transformer, load_state, save_state
from gateloop_transformer.layers.state import (
    AttentionState,
    GateLoopState,
    SimpleGateLoopState,
    TransformerState,
)


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for item in state for x in leaves(item)]


def make_states() -> dict[str, Any]:
    model = Transformer(8, num_tokens=5, depth=2, heads=2, dim_head=4, layer_pattern="gate attention", conv_size=2)
    _, state = model(torch.randint(5, (3, 7)), return_state=True)
    return {
        "gate": GateLoopState(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 0, 8)),
        "attention": AttentionState(
            torch.randn(3, 2, 5, 4), torch.randn(3, 2, 0, 4), torch.randn(3, 2, 5, 4), torch.full((3,), 5)
        ),
        "simple": SimpleGateLoopState(torch.randn(3, 8, dtype=torch.float64)),
        "half": SimpleGateLoopState(torch.randn(3, 8).bfloat16().T.contiguous().T),
        "model": state,
    }


KINDS = list(make_states())


@pytest.fixture(params=KINDS)
def state(request: pytest.FixtureRequest) -> Any:
    return make_states()[request.param]


def test_detach_cuts_the_graph(state: Any) -> None:
    live = state.map(lambda x: x.detach().requires_grad_() * 2 if x.is_floating_point() else x)
    cut = live.detach()
    assert type(cut) is type(state)
    assert all(x.requires_grad for x in leaves(live) if x.is_floating_point())
    assert not any(x.requires_grad for x in leaves(cut))
    assert all(torch.equal(x, y) for x, y in zip(leaves(cut), leaves(live), strict=True))


def test_to_converts_every_tensor(state: Any) -> None:
    for before, after in zip(leaves(state), leaves(state.to(torch.float64)), strict=True):
        assert after.dtype == (torch.float64 if before.is_floating_point() else torch.int64)
    assert {x.device.type for x in leaves(state.to("meta"))} == {"meta"}
    assert type(state.to("cpu")) is type(state)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        ([2, 0, 1], [2, 0, 1]),
        ([1, 1, 1, 0], [1, 1, 1, 0]),
        ([-1], [2]),
        ([], []),
        (torch.tensor([0, 2]), [0, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
    ],
    ids=str,
)
def test_select_reorders_repeats_and_picks(state: Any, index: Any, rows: list[int]) -> None:
    picked = state.select(index)
    assert type(picked) is type(state)
    assert picked.batch_size == len(rows)
    for new, old in zip(leaves(picked), leaves(state), strict=True):
        assert torch.equal(new, torch.stack([old[n] for n in rows]) if rows else old[:0])


@pytest.mark.parametrize("index", [[3], [-4], [True, False], [[0]], [0.5], [1j], None, "all", [None]], ids=str)
def test_select_refuses_rows_that_are_not_there(state: Any, index: Any) -> None:
    with pytest.raises(ValueError, match=r"select|boolean index"):
        state.select(index)


def test_a_file_gives_back_every_bit(state: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(state, path)
    loaded = load_state(path)
    assert type(loaded) is type(state)
    if isinstance(state, TransformerState):
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in state.layers]
    for new, old in zip(leaves(loaded), leaves(state), strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    save_state(loaded, str(path))


def test_a_loaded_state_continues_the_sequence(tmp_path: Path) -> None:
    model = Transformer(8, num_tokens=5, depth=2, heads=2, dim_head=4, layer_pattern="gate attention").eval()
    ids = torch.randint(5, (2, 9))
    _, state = model(ids[:, :4], return_state=True)
    save_state(state, tmp_path / "state")
    assert torch.equal(model(ids[:, 4:], load_state(tmp_path / "state")), model(ids[:, 4:], state))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(make_states()["model"], path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"no safetensors file at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            load_state(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no gate loop state"):
        load_state(path)
    with pytest.raises(FileNotFoundError, match="no state file"):
        load_state(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "state format 2, this library reads 1"),
        ({"kind": '"NewState"'}, "damaged.*NewState"),
        ({"kind": '"AttentionState"'}, "damaged.*keys"),
        ({"kind": "not json"}, "damaged"),
    ],
    ids=["newer", "unknown kind", "other kind", "no kind"],
)
def test_files_of_another_format_are_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(make_states()["gate"], path)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "gateloop-state", "version": "1", "kind": '"GateLoopState"', **changes})
    with pytest.raises(ValueError, match=message):
        load_state(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    save_state(make_states()["simple"], path)
    before = path.read_bytes()

    def fail(tensors: Any, filename: str, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(make_states()["gate"], path)
    assert path.read_bytes() == before
