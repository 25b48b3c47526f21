"""Estimates against what models have, multiply and keep."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gateloop_transformer import Transformer
from gateloop_transformer.cli import main
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.runs.config import RunConfig, TokenizerConfig, TrainingConfig, resolve
from gateloop_transformer.runs.presets import PRESETS
from gateloop_transformer.training.estimate import estimate
from gateloop_transformer.training.needs import Spread

SIZES: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
ODD: list[dict[str, Any]] = [
    {},
    {"gate_loop_heads": 4, "gate": "ring", "head_norm": True, "qk_norm": True, "conv_size": 3},
    {"gate_loop_heads": 6, "dim_gate_looped_attn": 12, "sub_ln": True, "attn_add_swish_gating": False},
    {"post_ln_norm": True, "ff_mult": 3, "depth": 3, "layer_pattern": "gate attention", "rotary_emb": True},
    {"use_gate_looped_attn": False, "data_dependent_rel_pos": "released"},
    {"layer_pattern": "attention", "data_dependent_rel_pos": "gate_loop", "dropout": 0.2},
    {"layer_pattern": "attention", "attn_window": 3, "qk_norm": True},
    {"gate": "ring", "ff_mult": 0, "conv_size": 4, "conv_silu": True, "qkv_bias": True},
    {"ablate_complex": True, "gate_loop_heads": 2, "gate": "paper"},
]


def with_tokens(run: RunConfig, count: int) -> RunConfig:
    return dataclasses.replace(run, tokenizer=TokenizerConfig("bpe", count, ""))


def run_of(options: dict[str, Any], **training: Any) -> RunConfig:
    return RunConfig(
        TransformerConfig(**{**SIZES, **options}), TrainingConfig(**{"context": 12, "batch": 3, **training})
    )


def bytes_kept(model: Transformer, ids: Tensor, narrow: bool) -> int:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        model(ids, return_loss=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize(
    ("options", "precision"), [*((options, "float32") for options in ODD), (ODD[1], "bf16"), (ODD[3], "bf16")]
)
def test_parameters_and_what_is_kept_are_those_of_the_model(options: dict[str, Any], precision: str) -> None:
    run = run_of(options, precision=precision)
    random = torch.get_rng_state()
    found = estimate(with_tokens(run, 40))
    assert torch.equal(torch.get_rng_state(), random)
    model = Transformer(**{**run.model.arguments(), "num_tokens": 40})
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(0, 40, (3, 13))
    memory = found.memory
    traced = memory.activations + memory.copies + memory.logits - 2 * 4 * 3 * 12 * 40
    assert traced == bytes_kept(model, ids, precision == "bf16")


@pytest.mark.parametrize("options", [ODD[0], ODD[1], ODD[2], {**ODD[4], "depth": 1}, ODD[7]])
def test_products_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    run = run_of(options)
    work = estimate(run).operations
    model, ids = Transformer(**run.model.arguments()), torch.randint(0, 256, (3, 13))
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, return_loss=True)
        assert counter.get_total_flops() == pytest.approx(3 * 12 * (work.products + work.attention))
        loss.backward()
    recurrence = 0 if work.recurrence == 0 else work.recurrence * (19 / 5 if "ablate_complex" in options else 4)
    assert counter.get_total_flops() == pytest.approx(3 * 12 * (work.training - recurrence))


def test_the_recurrence_of_known_sizes() -> None:
    """A number of the state takes 10 operations forwards and 30 backwards; with real gates 5 and 14."""
    for options, forward, whole in (
        ({"gate_loop_heads": 4}, 10 * 4 * 16, 40 * 4 * 16),
        ({}, 10 * 16, 40 * 16),
        ({"gate_loop_heads": 2, "ablate_state_transition": True}, 5 * 2 * 64, 19 * 2 * 64),
    ):
        work = estimate(run_of(options)).operations
        assert work.recurrence == 2 * forward
        assert work.training == 3 * work.products + 2 * whole


def test_attention_counts_the_keys_that_a_step_sees() -> None:
    inner = 16
    for options, keys in (({}, (12 + 1) / 2), ({"attn_window": 3}, (1 + 2 + 3 * 10) / 12)):
        work = estimate(run_of({"layer_pattern": "attention", "depth": 1, **options})).operations
        assert work.attention == pytest.approx(4 * inner * keys)


@pytest.mark.parametrize(("preset", "vocabulary"), list(zip(PRESETS, itertools.cycle([256, 32768]), strict=False)))
def test_presets_are_of_their_size(preset: str, vocabulary: int) -> None:
    run = resolve(preset, {"context": 8, "max_memory": 8}, None)
    found = estimate(with_tokens(run, vocabulary)).parameters
    with torch.device("meta"):
        model = Transformer(**{**run.model.arguments(), "num_tokens": vocabulary})
    assert found == sum(parameter.numel() for parameter in model.parameters())
    least, most = {
        "tiny": (0.95e6, 1.05e6),
        "small": (20e6, 22e6),
        "paper": (123e6, 125e6),
        "base": (110e6, 125e6),
        "medium": (345e6, 360e6),
        "large": (750e6, 780e6),
        "xl": (1.0e9, 1.3e9),
    }[preset]
    assert least <= found - 2 * (vocabulary - 256) * run.model.dim <= most


def test_memory_is_shared_out_and_communication_follows() -> None:
    run = run_of({"gate_loop_heads": 4, "conv_size": 3, "gate": "ring"}, batch=4, accumulate=2)
    alone, spread, sharded = (estimate(run, ranks) for ranks in (Spread(), Spread(4), Spread(4, sharded=True)))
    weights = 4 * alone.parameters
    assert alone.memory.weights == weights
    assert (alone.memory.moments, alone.memory.average) == (2 * weights, 0)
    assert alone.communication == type(alone.communication)(0, 0, 0)
    # Eight windows on four processes: two at once, in a single micro-batch.
    assert spread.memory.activations == alone.memory.activations // 2
    assert spread.communication.gradients == round(2 * 3 / 4 * weights)
    assert (sharded.communication.gradients, sharded.communication.weights) == (3 * weights // 4, 6 * weights // 4)
    assert sharded.memory.weights == pytest.approx(weights / 4, abs=4)
    assert spread.tokens_per_step == alone.tokens_per_step == 4 * 2 * 12
    training = dataclasses.replace(run.training, ema=0.9)
    with_average = estimate(dataclasses.replace(run, training=training)).memory
    assert with_average.total == alone.memory.total + weights


def test_several_micro_batches_keep_their_gradients() -> None:
    one, two = (estimate(run_of({}, accumulate=count)).memory for count in (1, 2))
    assert two.total == one.total + one.gradients


def test_states_of_context_parallel_do_not_depend_on_the_length() -> None:
    options = {"gate_loop_heads": 4, "conv_size": 3, "gate": "ring"}
    short, long = (estimate(run_of(options, context=length), Spread(2, 2)) for length in (12, 48))
    # Two layers, three windows: gates and states of four heads of 4 × 4, real and imaginary, then two gradients of
    # such states; two steps of the convolution, both ways.
    numbers = 2 * 4 * (1 + 16) + 2 * 2 * 4 * 16 + 2 * 2 * 16
    assert short.communication.states == long.communication.states == 2 * numbers * 4 * 3
    whole = estimate(run_of(options, context=48))
    assert long.memory.activations == pytest.approx(whole.memory.activations / 2, rel=0.02)
    mixed = {"layer_pattern": "gate attention", "gate_loop_heads": 4}
    sent = [estimate(run_of(mixed, context=length), Spread(2, 2)).communication.states for length in (12, 24)]
    # Keys and values of 6 more steps, of 2 heads of 8, both ways.
    assert sent[1] - sent[0] == 2 * 2 * 6 * 16 * 4 * 3
    with pytest.raises(ValueError, match="a context of 1 cannot be shared by 2 processes"):
        estimate(run_of(options, context=1), Spread(2, 2))
    with pytest.raises(ValueError, match="processes must be a multiple of context_parallel"):
        Spread(4, 3)


def test_a_dry_run_says_what_is_needed_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ["--preset", "xl", "--context", "64", "--dry-run"]
    assert main(["train", "absent.txt", "--out", str(out), *flags]) == 0
    text = capsys.readouterr().out
    assert text.startswith("1,094,683,904 parameters, 1.09 B (vocabulary: 256)\nmemory: about ")
    assert len(text.splitlines()) == 3
    assert main(["train", *flags, "--json", "--processes", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 1_094_683_904
    assert found["tokens"] == 42000 * found["tokens_per_step"] == 42000 * 4 * 64 * 64
    assert found["fsdp"]["communication"]["weights"] > 0 == found["communication"]["weights"]
    assert list(tmp_path.iterdir()) == []


def test_flags_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--attn-window", "8", "--heads", "2", "--decay", "0.3", "--parallel", "fsdp", "--dim", "16"]
    assert main(["train", "--dry-run", *flags]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert warnings == [
        "gateloop train: warning: --heads has no effect: the model has no attention layers",
        "gateloop train: warning: --attn-window has no effect: the model has no attention layers",
        "gateloop train: warning: --decay has no effect: it is for --schedule wsd",
        "gateloop train: warning: --parallel has no effect: one process holds all weights",
    ]
    flags += ["--layer-pattern", "gate attention", "--schedule", "wsd", "--processes", "2"]
    assert main(["train", "--dry-run", *flags]) == 0
    assert "has no effect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--out DIR is missing"),
        (["--dry-run", "--resume"], "--out DIR is missing"),
        (["--processes", "2", "--out", "x"], "--processes goes with --dry-run"),
        (["--dry-run", "--processes", "0"], "--processes must be at least 1, not 0"),
        (["--dry-run", "--gate-loop-heads", "7"], "heads must divide dim_inner"),
    ],
)
def test_what_makes_no_sense_is_one_line(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1


def test_a_start_says_its_needs_and_warns_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc " * 200)
    flags = ["--dim", "16", "--depth", "1", "--context", "16", "--batch", "2", "--sample-bytes", "0", "--steps", "1"]
    assert main(["train", str(text), "--out", str(tmp_path / "fits"), *flags]) == 0
    said = capsys.readouterr().out
    assert "\nmemory: about " in said
    assert "\nwork: " in said
    assert "warning" not in said
    monkeypatch.setattr("gateloop_transformer.training.estimate.available_memory", lambda _device: 1000)
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *flags]) == 0
    assert "\nwarning: this may not fit: " in capsys.readouterr().out


def test_memory_has_room_for_the_gradients_of_wide_mixers() -> None:
    run = run_of({"ff_mult": 0, "dim_gate_looped_attn": 640, "gate_loop_heads": 640}, batch=8, context=64)
    memory = estimate(with_tokens(run, 2)).memory
    # q, k and v together, and their gradients come before those of the weights.
    both = 2 * 4 * 8 * 64 * 3 * 640
    assert memory.total == 3 * memory.weights + memory.activations + both
