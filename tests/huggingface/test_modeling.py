"""Laws of the models: caches, padding, packing, files, embeddings, gradients."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import needs
from kinds import VOCABULARY, build
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
)

from gateloop_transformer import load_model
from gateloop_transformer.configuration import RECIPE
from gateloop_transformer.huggingface import GateLoopConfig, GateLoopForCausalLM, GateLoopModel
from gateloop_transformer.huggingface.cache import CACHE_NAME
from gateloop_transformer.runs.config import FORMAT, IDENTITY


def tokens(B: int = 3, T: int = 20) -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


# Row 0 has padding on the left, row 1 none, row 2 on the left too.
MASK = torch.ones(3, 20, dtype=torch.long)
MASK[0, :6] = MASK[2, :3] = 0


@torch.no_grad()
def test_the_library_gives_the_same_logits(model: Any, tmp_path: Path) -> None:
    ids = tokens()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(ids), model(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_pieces_equal_the_whole(model: Any) -> None:
    ids = tokens()
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 20)):
        parts.append(model(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-4, atol=2e-5)
    assert cache.get_seq_length() == 20


@torch.no_grad()
@pytest.mark.parametrize("mask", [MASK, MASK.flip(1)], ids=["left", "right"])
def test_padding_counts_for_nothing(model: Any, mask: Tensor) -> None:
    ids = tokens()
    padded = model(ids, attention_mask=mask).logits
    for row in range(3):
        there = mask[row] != 0
        torch.testing.assert_close(padded[row, there], model(ids[row, there][None]).logits[0], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_padded_pieces_equal_the_whole(model: Any) -> None:
    ids = tokens()
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 4), (4, 12), (12, 13), (13, 20)):
        output = model(ids[:, start:end], attention_mask=MASK[:, :end], past_key_values=cache)
        parts.append(output.logits)
    whole = model(ids[:1, 6:]).logits[0]
    torch.testing.assert_close(torch.cat(parts, 1)[0, 6:], whole, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_padding_is_never_embedded() -> None:
    model = build("recipe")
    ids = tokens()
    strange = ids.masked_fill(MASK == 0, 10**6)
    assert torch.equal(model(strange, attention_mask=MASK).logits, model(ids, attention_mask=MASK).logits)


@torch.no_grad()
def test_packed_documents_are_apart(model: Any) -> None:
    ids = tokens(1)
    positions = torch.cat([torch.arange(7), torch.arange(5), torch.arange(8)])[None]
    alone = torch.cat([model(part).logits for part in ids.split([7, 5, 8], 1)], 1)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, alone, rtol=1e-4, atol=2e-5)
    bounds = torch.tensor([0, 7, 12, 20], dtype=torch.int32)
    torch.testing.assert_close(model(ids, cu_seq_lens_q=bounds).logits, alone, rtol=1e-4, atol=2e-5)


def test_checkpointed_gradients_are_equal(model: Any) -> None:
    ids, gradients = tokens(), []
    model.train()
    for checkpointing in (False, True):
        # What both of transformers' names for switching it on and off call.
        function = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        model._set_gradient_checkpointing(checkpointing, function)
        assert model.is_gradient_checkpointing is checkpointing
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_cached_pass_has_gradients() -> None:
    model, ids = build("recipe"), tokens()
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :9], past_key_values=cache, use_cache=True).logits
    second = model(ids[:, 9:], past_key_values=cache, use_cache=True).logits
    (first.sum() + second.sum()).backward()
    weight = model.layers[0][0].fn.to_qkv.weight
    found, weight.grad = weight.grad, None
    model(ids).logits.sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_saved_weights_have_the_librarys_names(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    library = model.config.transformer_config.build(VOCABULARY).state_dict()
    assert saved.keys() == library.keys() == model.state_dict().keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, GateLoopForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == saved.keys()


@torch.no_grad()
def test_shards_are_read_on_both_sides(tmp_path: Path) -> None:
    model, ids = build("recipe"), tokens()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert torch.equal(load_model(tmp_path)(ids), model(ids).logits)
    next(tmp_path.glob("model-00001*")).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_model(tmp_path)


def test_a_new_model_starts_as_the_librarys() -> None:
    torch.manual_seed(3)
    config = GateLoopConfig(vocab_size=VOCABULARY, dim=16, depth=2, **RECIPE | {"max_memory": 7})
    gates = GateLoopForCausalLM(config).layers[0][0].fn
    library = config.transformer_config.build(VOCABULARY).layers[0][0].fn  # type: ignore[index, union-attr]
    assert torch.equal(gates.ring_logit, library.ring_logit)
    assert torch.equal(gates.to_qkv.bias, library.to_qkv.bias)


def test_weights_that_a_file_lacks_start_as_new(tmp_path: Path) -> None:
    model = build("recipe")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.1.0.fn.ring_logit"], weights["layers.0.0.fn.to_qkv.bias"], weights["to_logits.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.layers[1][0].fn.ring_logit, model.layers[1][0].fn.ring_logit)
    assert torch.equal(again.layers[0][0].fn.to_qkv.bias, (torch.arange(48) < 32).float())
    assert torch.equal(again.token_emb.weight, model.token_emb.weight)
    assert 0.05 < again.to_logits[1].weight.std() < 0.3


@torch.no_grad()
def test_embeddings_can_be_resized(tmp_path: Path) -> None:
    model, ids = build("polar"), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == VOCABULARY + 6
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).num_tokens == VOCABULARY + 6


@torch.no_grad()
def test_hidden_states_and_tuples() -> None:
    model, ids = build("norm after"), tokens()
    output = model(ids, output_hidden_states=True, attention_mask=MASK)
    assert [tuple(each.shape) for each in output.hidden_states] == [(3, 20, 16)] * 3
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits)
    assert isinstance(cache, DynamicCache)
    assert torch.equal(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)


@torch.no_grad()
def test_classification_reads_the_last_token(tmp_path: Path) -> None:
    build("recipe").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4).eval()
    ids = tokens()
    for mask in (MASK, MASK.flip(1)):
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row, mask[row] != 0][None]).logits[0]
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"attention_mask, or a config\.pad_token_id"):
        model(ids)
    model.config.pad_token_id = 0
    ids = ids.clamp(min=1).masked_fill(MASK.flip(1) == 0, 0)
    marked = model(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(model(ids).logits[1], marked[1], rtol=1e-4, atol=1e-5)
    assert model(ids, attention_mask=MASK, labels=torch.tensor([0, 1, 3])).loss.isfinite()
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="missing to_logits"):
        load_model(tmp_path / "classifier")


@torch.no_grad()
def test_the_body_alone(tmp_path: Path) -> None:
    model, ids = build("heads"), tokens()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(ids).last_hidden_state, model.run(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    assert torch.equal(again(ids).last_hidden_state, body(ids).last_hidden_state)


def test_a_backbone_shares_all_and_owns_nothing(model: Any) -> None:
    ids, names = tokens(), model.state_dict().keys()
    backbone = model.base_model
    assert backbone is model.model is model.get_decoder()
    assert type(backbone) is GateLoopModel
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in backbone.parameters()} < own
    assert not any(name.startswith(("model", "_backbone")) for name in names)
    hidden = backbone(ids).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(ids).logits, rtol=0, atol=0)
    # What is done to one is done to the other.
    backbone.requires_grad_(False)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight
    ]
    backbone._set_gradient_checkpointing(True, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    assert model.is_gradient_checkpointing
    model.train()
    assert getattr(backbone(ids), CACHE_NAME) is None
    # A module that has taken another's place, and a copy of all.
    model.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 16))
    assert model.model.token_emb is model.token_emb
    twin = copy.deepcopy(model)
    assert twin.model.layers is twin.layers
    assert twin.model.token_emb.weight is not model.token_emb.weight


def test_classes_are_learned_on_a_frozen_backbone(tmp_path: Path) -> None:
    build("hybrid").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    model.base_model.requires_grad_(False)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_model_with_its_cache_is_no_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gateloop export FOLDER --format onnx"):
        torch.onnx.export(build("recipe"), (tokens(1, 5),), tmp_path / "model.onnx", dynamo=False)


@torch.no_grad()
@needs("torch", "2.7", "what transformers puts around a model does not compile before")
def test_half_precision_and_compilation() -> None:
    model, ids = build("recipe"), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids, past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")(ids[:, :1], past_key_values=cache)
    whole = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(step.logits, whole, rtol=1e-4, atol=1e-5)
    half = model.to(torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


def test_training_keeps_no_cache_and_counts_items() -> None:
    model, ids = build("polar").train(), tokens()
    output = model(ids, labels=ids)
    assert output.past_key_values is None
    assert model(ids, labels=ids, num_items_in_batch=3 * 19 * 2).loss.item() == pytest.approx(output.loss.item() / 2)


@torch.no_grad()
def test_wrong_input_is_refused() -> None:
    model, ids = build("hybrid"), tokens()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"must be in \[0, 50\), got 0 to 99"):
        model(torch.tensor([[0, 99]]))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 20 or more\), not \(3, 7\)"):
        model(ids, attention_mask=MASK[:, :7])
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="must be a transformers Cache"):
        model(ids, past_key_values=())
    with pytest.raises(ValueError, match="static cache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"foo": 1}, "unknown: foo"),
        ({"dim": "wide"}, "dim must be one of int"),
        ({"gate": "new"}, "gate must be one of polar, paper, ring"),
        ({"format": 99}, "format 99, which a newer version"),
        ({"format": 1}, "format 1, which no release"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"vocab_size": 0}, "vocab_size must be"),
    ],
)
def test_wrong_configurations_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        GateLoopConfig(**values)
    file = {**IDENTITY, "format": FORMAT, "vocab_size": 9, **values}
    (tmp_path / "config.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_goes_round() -> None:
    config = GateLoopConfig(vocab_size=9, hidden_size=24, num_hidden_layers=3, layer_pattern="gate gate attention")
    again = GateLoopConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.transformer_config == config.transformer_config
    assert (config.dim, config.depth) == (24, 3)
    assert config.layer_types == ["linear_attention", "linear_attention", "full_attention"]
