"""Train a GateLoop model with transformers' Trainer: documents packed without padding, LoRA (peft) on request.

python examples/finetune_with_trainer.py [--run DIR --text FILE --out DIR --steps 100 --lora]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.huggingface import GateLoopConfig

parser = argparse.ArgumentParser()
parser.add_argument("--run", help="a folder of `gateloop train` or of save_pretrained (default: a small new model)")
parser.add_argument("--text", type=Path, default=Path(__file__), help="documents, with an empty line between two")
parser.add_argument("--out", type=Path, default=Path("runs/finetuned"))
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--lora", action="store_true")
options = parser.parse_args()
if options.run is None:
    options.run = options.out / "new"
    recipe = {"gate": "ring", "ff_mult": 0, "conv_size": 4, "conv_silu": True, "qkv_bias": True}
    AutoModelForCausalLM.from_config(GateLoopConfig(dim=64, depth=2, **recipe)).save_pretrained(options.run)
    ByteTokenizer().save(options.run)
tokenizer, model = AutoTokenizer.from_pretrained(options.run), AutoModelForCausalLM.from_pretrained(options.run)
if options.lora:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM"))
documents = [text.strip() for text in options.text.read_text(encoding="utf-8").split("\n\n") if len(text.strip()) > 1]
rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in documents]
settings = {"max_steps": options.steps, "learning_rate": 3e-3, "report_to": [], "dataloader_pin_memory": False}
arguments = TrainingArguments(str(options.out), **settings)
Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening()).train()
model = model.merge_and_unload() if options.lora else model
model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
