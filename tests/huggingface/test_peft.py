"""PEFT: one list of targets for gate loops and attention, none needed; prompts that are learned; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, VOCABULARY, build

from gateloop_transformer import load_model

peft = pytest.importorskip("peft")
# What PEFT says of every norm that is not torch's, and of the positions that generate passes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 2, "init_lora_weights": False}),
    "dora": (peft.LoraConfig, {"r": 2, "init_lora_weights": False, "use_dora": True}),
    "ia3": (peft.IA3Config, {}),
    "loha": (peft.LoHaConfig, {"r": 2, "init_weights": False}),
    "norms": (peft.LNTuningConfig, {}),
}
BARE = {"attn_add_swish_gating": False, "ff_mult": 0}


def adapt(model: Any, method: str, **options: Any) -> Any:
    kind, own = METHODS[method]
    return peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **own, **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["hybrid", "gated positions", "recipe", "attention", "bare"])
def test_no_targets_need_be_named(kind: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("hybrid", **BARE) if kind == "bare" else build(kind)
    model.save_pretrained(tmp_path)
    ids = torch.randint(VOCABULARY, (2, 9))
    adapted = adapt(model, method)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    for n in range(2):
        assert any(f".layers.{n}.0." in name for name in trained), f"nothing of layer {n} is adapted"
    # Merged, the model has the library's names again.
    if method != "norms":
        merged = adapted.merge_and_unload()
        logits = merged(ids).logits
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(load_model(tmp_path).eval()(ids), logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_go_by_their_names_in_every_layer(kind: str) -> None:
    model = build(kind)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = adapt(model, "lora", target_modules=["to_qkv", "to_qkv.0", "to_out", "to_out.1"])
    found = {name.removeprefix("base_model.model.") for name in adapted.targeted_module_names}
    assert found == {name for name in linear if ".to_qkv" in name or ".to_out" in name}
    # The targets of a model of gate loops alone are no error elsewhere.
    if kind != "attention":
        adapt(build(kind), "loha", target_modules=["to_qkv", "to_out", "to_a.0", "to_gates.0"])


@pytest.mark.parametrize("method", ["prompt", "p"])
def test_learned_prompts_find_the_models_sizes(method: str) -> None:
    torch.manual_seed(0)
    configuration = {"prompt": peft.PromptTuningConfig, "p": peft.PromptEncoderConfig}[method]
    tuned = peft.get_peft_model(build("hybrid"), configuration(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    ids = torch.randint(VOCABULARY, (2, 9))
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters() if p.requires_grad)
    tuned.eval()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(*(tuned.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False)))


def test_prefix_tuning_needs_attention_everywhere() -> None:
    ids = torch.randint(VOCABULARY, (2, 9))
    for kind in ("attention", "hybrid"):
        configuration = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(build(kind), configuration)
        if kind == "attention":
            tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            continue
        with pytest.raises(ValueError, match="keys and values for layer 0, a gate loop, which has none"):
            tuned(input_ids=ids, attention_mask=torch.ones_like(ids))
