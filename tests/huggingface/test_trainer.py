"""Trainer, packing, LoRA: nothing of theirs needs a subclass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import build
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from gateloop_transformer.data.tokenizer import ByteTokenizer

TEXT = b"the gates decide how long to remember, and the phases what for. " * 20
ROWS = [{"input_ids": list(TEXT[start : start + 20 + start % 11])} for start in range(0, 800, 25)]


def train(tmp_path: Path, collator: Any, steps: int = 4, **options: Any) -> Any:
    model = build("recipe", vocab_size=256).train()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_steps=2,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, data_collator=collator)
    trainer.train()
    return trainer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """That of bytes, as transformers loads it."""
    ByteTokenizer().save(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_trainer_learns_and_saves(tmp_path: Path, tokenizer: Any, precision: str) -> None:
    trainer = train(tmp_path, DataCollatorForLanguageModeling(tokenizer, mlm=False), 8, bf16=precision == "bf16")
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 0.1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-8")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name


def test_trainer_resumes(tmp_path: Path, tokenizer: Any) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    whole = train(tmp_path, collator, 4).model.state_dict()
    again = Trainer(
        model=build("recipe", vocab_size=256),
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=ROWS,
        data_collator=collator,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [False, True], ids=["positions", "cu_seqlens"])
def test_flattened_rows_lose_as_padded_ones(tokenizer: Any, bounds: bool) -> None:
    model = build("recipe", vocab_size=256)
    # With padding on the left transformers asks for a row's first token too.
    tokenizer.padding_side = "right"
    padded = DataCollatorForLanguageModeling(tokenizer, mlm=False)(ROWS[:4])
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=bounds)(ROWS[:4])
    with torch.no_grad():
        one, other = model(**padded).loss, model(**flat).loss
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert math.isfinite(one)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_the_projections(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build("recipe", vocab_size=256)
    model.save_pretrained(tmp_path)
    ids = torch.randint(256, (2, 30))
    targets = ["to_qkv", "to_out", "to_a.0", "to_gates.0"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = adapted(input_ids=ids).logits
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    after = adapted(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, after)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"return_position_ids": False, "return_seq_idx": True},
        {"position_ids_start": 2},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
    ],
    ids=["documents", "positions from 2", "bounds"],
)
def test_flattened_rows_are_apart_however_marked(options: dict[str, Any]) -> None:
    model = build("recipe", vocab_size=256)
    with torch.no_grad():
        one, other = (model(**DataCollatorWithFlattening(**each)(ROWS[:4])).loss for each in ({}, options))
    torch.testing.assert_close(other, one)


def test_smoothed_labels_are_shifted(tmp_path: Path, tokenizer: Any) -> None:
    model = build("recipe", vocab_size=256)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(ROWS[:4])
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=1e-7, use_cpu=True, report_to=[])
    smoothed = Trainer(model=model, args=arguments).compute_loss(model, dict(batch))
    torch.testing.assert_close(smoothed, model(**batch).loss, rtol=1e-5, atol=1e-5)


def test_evaluation_returns_logits_alone(tmp_path: Path, tokenizer: Any) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=build("hybrid", vocab_size=256), args=arguments, data_collator=collator)
    found = trainer.predict(ROWS[:3])
    assert found.predictions.shape == (3, 26, 256)
    assert math.isfinite(found.metrics["test_loss"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["recipe", "heads", "hybrid"])
def test_lora_on_all_linear_layers_learns_everywhere(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, ids = build(kind, vocab_size=256), torch.randint(256, (2, 12))
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    silent = [name for name, p in adapted.named_parameters() if p.requires_grad and not (p.grad != 0).any()]
    assert silent == []
    adapted.eval()
    found = [adapted.generate(input_ids=ids, max_new_tokens=4, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)
