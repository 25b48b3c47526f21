"""GateLoopConfig as other configurations of transformers are: compared, copied, derived from."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, VOCABULARY, build
from transformers import AutoConfig, AutoModelForCausalLM

from gateloop_transformer.huggingface import GateLoopConfig


def test_configurations_are_equal_where_all_fields_are(tmp_path: Path) -> None:
    config = GateLoopConfig(dim=32, pad_token_id=3)
    assert config != GateLoopConfig(dim=64, pad_token_id=3)
    assert config != GateLoopConfig(dim=32)
    config.save_pretrained(tmp_path)
    again = (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)))
    for other in (*again, AutoConfig.from_pretrained(tmp_path), AutoConfig.for_model(**config.to_dict())):
        assert other == config
    assert GateLoopConfig.from_dict(config.to_diff_dict()) == config


def test_classes_of_users() -> None:
    class Plain(GateLoopConfig):
        model_type = "plain"

    class Extended(GateLoopConfig):
        model_type = "extended"

        def __init__(self, extra: int = 1, **kwargs: Any) -> None:
            self.extra = extra
            super().__init__(**kwargs)

    assert Plain(dim=32).transformer_config.dim == 32
    assert Plain(dim=32) == Plain(dim=32) != Plain(dim=64)
    assert Extended(extra=1, dim=32) != Extended(extra=2, dim=32)
    assert Extended.from_dict(Extended(extra=2).to_dict()).extra == 2
    assert Plain() != GateLoopConfig()
    with pytest.raises(ValueError, match="unknown: foo"):
        Plain(foo=1)


def test_a_dictionary_has_both_names_and_a_file_one(tmp_path: Path) -> None:
    config = GateLoopConfig(dim=32, depth=3, attn_window=9)
    fields = config.to_dict()
    assert (fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]) == (32, 3, 8)
    assert fields["sliding_window"] == 9
    assert GateLoopConfig(**fields) == config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dim"] == 32
    assert not {*config.attribute_map, "auto_map"} & written.keys()
    assert config.auto_map == {}


def test_a_field_by_two_names_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size is another name of dim"):
        GateLoopConfig(dim=32, hidden_size=64)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_is_in_one_precision(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(build(kind).config, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(torch.randint(VOCABULARY, (2, 5))).logits.dtype == torch.float64


@torch.no_grad()
def test_a_saved_precision_is_kept(tmp_path: Path) -> None:
    model = build("recipe").bfloat16()
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": "auto"}, {"dtype": "auto", "device_map": "cpu"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        for name, tensor in model.state_dict().items():
            assert again.state_dict()[name].dtype == torch.bfloat16
            assert torch.equal(again.state_dict()[name], tensor)
