"""TRL's trainers on models that mix gate loops and attention, with no subclass and no special case."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from gateloop_transformer import load_model
from gateloop_transformer.data.tokenizer import ByteTokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

# TRL still uses names that transformers 5.23 calls old.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

TEXTS = ["the gates decide", "how long to remember", "and the phases", "what for"]
PROMPTS = ["the gates ", "the phases "] * 2
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained")
    build("hybrid", vocab_size=256, gate="ring", eos_token_id=0, pad_token_id=0).save_pretrained(path)
    ByteTokenizer().save(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """One that finds the end of a text where TRL has written it, as a text."""
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=False)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Of every trainer."""
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }


def first_loss(trainer: Any) -> float:
    trainer.train()
    return float(next(record["loss"] for record in trainer.state.log_history if "loss" in record))


def expected_loss(folder: Path, texts: list[str], prompts: list[str]) -> float:
    """Mean nats over the tokens of texts after their prompts, each with its end, read alone by the library's model."""
    model, nats = load_model(folder).requires_grad_(False), []
    for text, prompt in zip(texts, prompts, strict=True):
        ids = torch.tensor([*prompt.encode(), *text.encode(), 0])
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        nats.append(losses[max(len(prompt.encode()) - 1, 0) :])
    return float(torch.cat(nats).mean())


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packing": True, "max_length": 128},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_any_layout_lose_as_each_text_alone(
    folder: Path, tokenizer: Any, options: dict[str, Any], mode: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**options, **MODES[mode]),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    assert first_loss(trainer) == pytest.approx(expected_loss(folder, TEXTS, [""] * 4), rel=1e-4)
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []


def test_prompts_are_not_learned_and_a_folder_will_do(folder: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    data = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": TEXTS})
    trainer = trl.SFTTrainer(str(folder), trl.SFTConfig(**options), train_dataset=data, processing_class=tokenizer)
    assert first_loss(trainer) == pytest.approx(expected_loss(folder, TEXTS, PROMPTS), rel=1e-4)


def test_lora_and_messages(folder: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"messages": [turns] * 4}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM"),
    )
    assert math.isfinite(first_loss(trainer))
    changed = {name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()}
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in name} == changed
    assert any(".layers.0.0.fn.to_qkv." in name for name in changed)
    assert any(".layers.1.0.fn.to_qkv.0." in name for name in changed)


def test_preferences_without_a_reference_model(folder: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": TEXTS, "rejected": ["no"] * 4}),
        processing_class=tokenizer,
    )
    assert first_loss(trainer) == pytest.approx(math.log(2), rel=1e-4)


def test_rewards(folder: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.to_logits[1].weight.clone()
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text))) for text in completions],
        args=trl.GRPOConfig(num_generations=2, max_completion_length=6, **options),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    assert math.isfinite(first_loss(trainer))
    assert not torch.equal(model.to_logits[1].weight, before)
