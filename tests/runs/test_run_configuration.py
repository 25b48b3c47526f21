"""What a run is made of: presets, flags and files of configuration, of earlier formats too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import error_of, train

from gateloop_transformer import Transformer
from gateloop_transformer.cli import main
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.runs.config import PRESETS, RunConfig, TrainingConfig, resolve
from gateloop_transformer.runs.folder import load_model


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--dim N", "default: the preset's; tiny: 208"),
        ("--lr X", "default: the preset's; tiny: 0.006"),
        ("--dropout X", "default: the preset's; tiny: 0.0"),
        ("--clip X", "default: 1.0"),
    ],
)
def test_help_says_which_defaults_are_the_presets(capsys: pytest.CaptureFixture[str], flag: str, default: str) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    of_flag = text[text.rindex(f" {flag} ") + len(flag) + 2 :].split(" --")[0]
    assert of_flag.endswith(f"({default})")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_configuration_file(preset: str) -> None:
    config = resolve(preset, {}, None)
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json())), "config.json") == config


def test_what_a_preset_has_follows_what_is_given() -> None:
    assert resolve("tiny", {}, None).model.max_memory == 64
    assert resolve("tiny", {"context": 1024}, None).model.max_memory == 256
    assert resolve("base", {"context": 4096}, None).model.max_memory == 4096
    assert resolve("tiny", {"context": 2}, None).model.max_memory == 2
    assert resolve("tiny", {"context": 1024, "max_memory": 9}, None).model.max_memory == 9
    assert resolve("tiny", {}, None).model.gate_rank == 16
    assert resolve("tiny", {"dim": 512}, None).model.gate_rank == 32
    assert resolve("tiny", {"dim": 512, "gate_rank": 3}, None).model.gate_rank == 3
    for few in ({"dim": 16}, {"fixed_gates": True}, {"gate_loop_heads": 8}):
        assert resolve("tiny", few, None).model.gate_rank is None
    assert resolve("paper", {"context": 1024}, None).model.max_memory == TransformerConfig().max_memory


def test_the_configuration_has_every_argument_of_the_model() -> None:
    import inspect

    arguments = set(inspect.signature(Transformer).parameters)
    assert set(TransformerConfig().arguments()) == arguments - {"checkpoint_gate_looped_attn", "backend"}
    defaults = Transformer(**TransformerConfig(depth=1, dim=8).arguments())
    assert isinstance(defaults, Transformer)


def test_a_model_of_the_first_format_is_still_read(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--no-qkv-bias", "--no-conv-silu", steps=3) == 0
    values = json.loads((out / "config.json").read_text())
    for part, kind in (("model", TransformerConfig), ("training", TrainingConfig)):
        for item in dataclasses.fields(kind):
            if item.metadata["since"] > 1:
                del values[part][item.name]
    values |= {"format": 1, "tokenizer": "bytes", "data_sha256": "that of another split"}
    del values["field"]
    (out / "config.json").write_text(json.dumps(values))
    for path in out.rglob("model.safetensors"):
        tensors = load_file(path)
        save_file(tensors, path, {"model": json.dumps(values["model"], sort_keys=True)})
    load_model(out)
    (out / "checkpoints" / "step-000000003" / "random.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 2
    assert "earlier version, whose runs this one cannot continue" in error_of(capsys)
    values["format"] = 2
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="missing: attn_window"):
        load_model(out)
