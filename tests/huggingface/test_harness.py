"""lm-evaluation-harness measures saved models as the library does, and Trainer trains on two processes as on one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import processes
import pytest
import torch
from kinds import build

from gateloop_transformer import load_model
from gateloop_transformer.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.slow
TASK = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
TRAINING = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import gateloop_transformer.huggingface
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
rows = [{"input_ids": list(range(n, n + 20)), "labels": list(range(n, n + 20))} for n in range(64)]
arguments = TrainingArguments(
    sys.argv[2], max_steps=3, per_device_train_batch_size=int(sys.argv[3]), use_cpu=True, report_to=[],
    dataloader_pin_memory=False, disable_tqdm=True, learning_rate=1e-3, save_steps=3,
)
Trainer(model, arguments, train_dataset=rows).train()
"""


def test_the_harness_gives_the_librarys_bits(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = build("recipe", vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    texts = ["the gates decide how long", "to remember, é"]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    code = f"""
import json, lm_eval, gateloop_transformer.huggingface
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf", model_args="pretrained={tmp_path / "model"},max_length=512", tasks=["tiny_text"], device="cpu",
    batch_size=1, task_manager=TaskManager(include_path="{tmp_path / "tasks"}"),
)
print(json.dumps(found["results"]["tiny_text"]["bits_per_byte,none"]))
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    said = processes.python("-c", code, env=offline)
    library, bits, count = load_model(tmp_path / "model"), 0.0, 0
    for text in texts:
        # The harness begins with the token of the end.
        ids = torch.tensor([[0, *text.encode()]])
        with torch.no_grad():
            chosen = library(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        bits, count = bits - chosen.sum().item() / math.log(2), count + ids.shape[1] - 1
    assert json.loads(said.splitlines()[-1]) == pytest.approx(bits / count, rel=1e-5)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    build("recipe", vocab_size=256).save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(TRAINING)
    launchers = [], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    weights = []
    for launcher, rows in zip(launchers, ("8", "4"), strict=True):
        out = tmp_path / rows
        processes.python(*launcher, str(tmp_path / "train.py"), str(tmp_path / "model"), str(out), rows)
        weights.append(load_model(out / "checkpoint-3").state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
