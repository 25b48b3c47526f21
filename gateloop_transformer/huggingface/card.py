"""Publishing a run: a folder that transformers loads, with a model card that describes it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from gateloop_transformer.files import make_folder, write_text
from gateloop_transformer.huggingface.configuration import GateLoopConfig
from gateloop_transformer.huggingface.modeling import GateLoopForCausalLM
from gateloop_transformer.runs.config import RunConfig
from gateloop_transformer.runs.curves import read_records
from gateloop_transformer.runs.folder import CURVE, METRICS, load_model, load_tokenizer, read_config
from gateloop_transformer.stored import as_text, read_tensors, write_tensors

CARD = "README.md"


def convert(run: str | os.PathLike[str], **options: Any) -> GateLoopForCausalLM:
    """Load the model of a run (or of any folder that `load_model` reads) for transformers, in evaluation mode.

    Args:
        run: the folder.
        options: further fields of GateLoopConfig.

    Raises:
        ValueError: the folder holds no model, or there is no such field.
    """
    whole, path = load_model(run), Path(run)
    config = GateLoopConfig.from_pretrained(path)
    for name, value in options.items():
        if not hasattr(config, name):
            raise ValueError(f"convert: GateLoopConfig has no field {name!r}")
        setattr(config, name, value)
    model = GateLoopForCausalLM(config)
    model.load_state_dict(whole.state_dict())
    model.eval()
    return model


def export(run: str | os.PathLike[str], out: str | os.PathLike[str], max_shard_size: str | int = "50GB") -> None:
    """Write a run as a folder to publish: weights, configuration, tokenizer, model card and curve.

    `AutoModelForCausalLM`, `AutoTokenizer` and `load_model` read it, and it can be pushed to a hub as it is.

    Args:
        run: the folder of a run.
        out: the folder to write; it is made if it does not exist.
        max_shard_size: largest size of a file of weights, as transformers takes it.

    Raises:
        ValueError: the folder holds no run with weights, or `out` is not empty.
    """
    source, target = Path(run), Path(out)
    config, tokenizer = read_config(source), load_tokenizer(source)
    model = convert(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(target)!r} already exists and is not empty: choose another folder")
    make_folder(target)
    with _without_bars():
        model.save_pretrained(target, max_shard_size=max_shard_size)
    for file in target.glob("*.safetensors"):
        # With checksums, which transformers does not write.
        write_tensors(file, *read_tensors(file))
    tokenizer.save(target)
    if (source / CURVE).is_file():
        shutil.copyfile(source / CURVE, target / CURVE)
    write_text(target / CARD, model_card(source, config, sum(each.numel() for each in model.parameters())))


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' own progress bars, as the command line shows progress itself."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def model_card(run: Path, config: RunConfig, parameters: int) -> str:
    """The card of a run, from its configuration and its metrics."""
    records = read_records(run / METRICS) if (run / METRICS).is_file() else []
    valid = [record for record in records if "bits_per_byte" in record]
    trained = [record for record in records if {"tokens", "seconds"} <= record.keys()]
    settings, data = (
        config.training,
        as_text(Path(config.data).name) if config.data else "the Python standard library's sources",
    )
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gateloop", "linear-recurrence"],
    }
    figures = [f"- Parameters: {parameters:,}", f"- Tokens: {_tokens(config)}"]
    if valid:
        best = min(valid, key=lambda record: record["bits_per_byte"])
        figures.append(
            f"- Validation: {valid[-1]['bits_per_byte']:.4f} bits per byte after {valid[-1]['step']:,} steps "
            f"(best: {best['bits_per_byte']:.4f} at step {best['step']:,})"
        )
    if trained:
        last = trained[-1]
        figures.append(
            f"- Training: {last['tokens']:,} tokens in {last['step']:,} steps, {last['seconds']:,.0f} seconds"
        )
    figures.append(
        f"- Windows of {settings.context:,} tokens, {settings.windows} in a step; learning rate {settings.lr:g}"
    )
    source = f"- Data: {data}" + (f", SHA-256 of the corpus {config.data_sha256}" if config.data_sha256 else "")
    curve = [f"![Loss by step]({CURVE})", ""] if (run / CURVE).is_file() else []
    return "\n".join(
        [
            "---",
            *(f"{name}: {json.dumps(value)}" for name, value in front.items()),
            "---",
            "",
            f"# {as_text(run.resolve().name)}",
            "",
            "A GateLoop language model: a linear recurrence with data-controlled gates, whose state has one size",
            "however long the text is. Trained with `gateloop train`; the numbers below are of that run.",
            "",
            *figures,
            source,
            "",
            *curve,
            "## Use",
            "",
            "Install the library from its sources: `pip install '.[hf]'` in a checkout. (By its name `pip install`",
            "finds gateloop-transformer 0.2.5, another program, which does not know this model.) Then",
            "",
            "```python",
            "import gateloop_transformer.huggingface  # makes transformers know the model",
            "from transformers import pipeline",
            "",
            'generator = pipeline("text-generation", model="path/to/this/folder")',
            'print(generator("Once", max_new_tokens=100)[0]["generated_text"])',
            "```",
            "",
            "or `gateloop generate path/to/this/folder --prompt Once`. Without the import transformers says that it",
            "does not recognize the model type `gateloop`, and to upgrade, which does not help.",
            "",
            "## Limits",
            "",
            "It has seen nothing but the data above: what it writes may be wrong, and as that data is. It has not been",
            "tuned to follow instructions.",
            "",
            "## Configuration",
            "",
            "```json",
            json.dumps({"model": vars(config.model), "training": vars(settings)}, indent=1),
            "```",
            "",
        ]
    )


def _tokens(config: RunConfig) -> str:
    return (
        "bytes" if config.tokenizer.kind == "bytes" else f"byte-level BPE, {config.tokenizer.size:,} in the vocabulary"
    )
