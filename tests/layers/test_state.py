"""Laws of states: transforms, files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateloop_transformer import (
    AttentionState,
    Bidirectional,
    CausalFullAttention,
    GateLoopedAttention,
    GateLoopState,
    SimpleGateLoopLayer,
    SimpleGateLoopState,
    Transformer,
    TransformerState,
    describe_state,
    load_state,
    quantize,
    save_state,
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


def test_a_copy_has_memory_of_its_own(state: Any) -> None:
    copy = state.copy()
    assert type(copy) is type(state)
    before = [x.clone() for x in leaves(state)]
    for x in leaves(copy):
        x.zero_()
    assert all(torch.equal(x, y) for x, y in zip(leaves(state), before, strict=True))


def test_repeat_puts_copies_of_a_row_beside_each_other(state: Any) -> None:
    rows = state.batch_size
    expected = state.select([row for row in range(rows) for _ in range(3)])
    assert all(torch.equal(x, y) for x, y in zip(leaves(state.repeat(3)), leaves(expected), strict=True))
    assert state.repeat(0).batch_size == 0


@pytest.mark.parametrize("times", [-1, 1.0, True, None])
def test_repeat_refuses_what_is_no_count(state: Any, times: Any) -> None:
    with pytest.raises(ValueError, match="repeat: times must be"):
        state.repeat(times)


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
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            load_state(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="does not hold a gate loop state"):
        load_state(path)
    with pytest.raises(FileNotFoundError, match="no state file"):
        load_state(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1"}, "state format 1; this library reads format 2"),
        ({"version": "3"}, "state format 3; this library reads format 2"),
        ({"kind": '"NewState"'}, "damaged.*checksum"),
        ({}, "damaged.*checksum"),
    ],
    ids=["older", "newer", "another kind", "no checksum"],
)
def test_files_of_another_format_are_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(make_states()["gate"], path)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "gateloop-state", "version": "2", "kind": '"GateLoopState"', **changes})
    with pytest.raises(ValueError, match=message):
        load_state(path)


def test_no_byte_of_a_file_may_change(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(make_states()["gate"].select([0]), path, {"position": "7"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        for other in (whole[place] ^ 1, whole[place] ^ 0x80, 0x20 if whole[place] != 0x20 else 0x09):
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"damaged|state format|not hold a gate loop state"):
                load_state(path)
    path.write_bytes(whole)
    load_state(path)
    assert describe_state(path) == {"position": "7"}


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    save_state(make_states()["simple"], path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(make_states()["gate"], path)
    assert path.read_bytes() == before


ATTENTION: dict[str, Any] = {"heads": 2, "dim_head": 4}
LAYERS: dict[str, Any] = {
    "channels": lambda: GateLoopedAttention(8),
    "heads": lambda: GateLoopedAttention(8, heads=2, dim_inner=12, gate="ring", conv_size=3, head_norm=True),
    "backwards": lambda: GateLoopedAttention(8, heads=2, conv_size=2, reverse=True),
    "simple": lambda: SimpleGateLoopLayer(8),
    "simple, backwards": lambda: SimpleGateLoopLayer(8, use_heinsen=True, reverse=True),
    "attention": lambda: CausalFullAttention(8, **ATTENTION, rotary_emb=True),
    "window": lambda: CausalFullAttention(8, **ATTENTION, rotary_emb=True, window=3),
    "over time": lambda: CausalFullAttention(8, **ATTENTION, data_dependent_rel_pos="gate_loop"),
    "released": lambda: CausalFullAttention(8, **ATTENTION, data_dependent_rel_pos=True),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_from_the_initial_state_is_one_without_a_state(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    x, bounds = torch.randn(2, 7, 8, dtype=dtype), torch.tensor([0, 3, 3, 7])
    near = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    for rows, x_part, marks in ((2, x, {}), (3, x[:1], {"cu_seqlens": bounds})):
        start = layer.initial_state(rows)
        y, state = layer(x_part, return_state=True, **marks)
        found, after = layer(x_part, state=start, return_state=True, **marks)
        torch.testing.assert_close(found, y, **near)
        assert type(start) is type(after) is type(state)
        assert start.batch_size == rows
        for one, other, first in zip(leaves(after), leaves(state), leaves(start), strict=True):
            torch.testing.assert_close(one, other, **near)
            assert first.dtype == other.dtype
            assert not first.any()
    # A call of no steps ends where it began.
    for one, other in zip(leaves(layer(x[:, :0], return_state=True)[1]), leaves(layer.initial_state(2)), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_models_initial_state_and_where_it_is() -> None:
    model = Transformer(8, num_tokens=5, depth=2, layer_pattern="gate attention", conv_size=2, **ATTENTION)
    ids = torch.randint(5, (3, 6))
    for each in (model, quantize(model, "int8"), quantize(model, "bfloat16")):
        logits, state = each(ids, return_state=True)
        found, after = each(ids, each.initial_state(3), return_state=True)
        assert [type(layer) for layer in after.layers] == [GateLoopState, AttentionState]
        for one, other in zip([found, *leaves(after)], [logits, *leaves(state)], strict=True):
            torch.testing.assert_close(one, other)
    elsewhere = model.initial_state(2, device="meta", dtype=torch.bfloat16)
    assert {leaf.device.type for leaf in leaves(elsewhere)} == {"meta"}
    assert elsewhere.layers[0].real.dtype == torch.float32
    assert elsewhere.layers[1].values.dtype == torch.bfloat16
    assert model.initial_state(0).batch_size == 0


@pytest.mark.parametrize("batch", [-1, 2.0, True, None], ids=repr)
def test_a_number_of_rows_that_is_none_is_refused(batch: Any) -> None:
    for layer in (GateLoopedAttention(8), Transformer(8, num_tokens=5, depth=1)):
        with pytest.raises(
            ValueError, match=rf"{type(layer).__name__}: initial_state: batch must be an integer of 0 or more"
        ):
            layer.initial_state(batch)


def test_both_directions_together_have_no_state() -> None:
    with pytest.raises(ValueError, match="Bidirectional: has no state"):
        Bidirectional(GateLoopedAttention, 8).initial_state(2)
