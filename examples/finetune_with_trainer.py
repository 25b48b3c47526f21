"""Go on training a run with transformers' Trainer, documents packed without padding.

python examples/finetune_with_trainer.py RUN TEXT --out DIR [--steps 100] [--lora]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

import gateloop_transformer.huggingface  # noqa: F401 (transformers learns of the models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder of `gateloop train`, or of save_pretrained")
    parser.add_argument("text", type=Path, help="documents, with an empty line between two")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lora", action="store_true", help="train low-rank changes of the projections (needs peft)")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.run)
    model = AutoModelForCausalLM.from_pretrained(options.run)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["to_qkv", "to_a.0", "to_gates.0", "to_out"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    documents = [part.strip() for part in options.text.read_text().split("\n\n") if len(part.strip()) > 1]
    arguments = TrainingArguments(
        options.out, max_steps=options.steps, learning_rate=1e-3, report_to=[], dataloader_pin_memory=False
    )
    rows = [{"input_ids": tokenizer(document)["input_ids"]} for document in documents]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    trainer.train()
    model = model.merge_and_unload() if options.lora else model
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
