"""What a run is made of: presets, flags and files of configuration, of earlier formats too."""

from __future__ import annotations

import json

import pytest

from gateloop_transformer import Transformer
from gateloop_transformer.cli import main
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.runs.config import PRESETS, RunConfig, resolve


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
