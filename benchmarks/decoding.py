"""Decoding measured: smaller weights and drafted tokens, on trained models. Writes docs/results/decoding.md.

gateloop train --out runs/tiny --preset tiny
gateloop train --out runs/small --preset small --minutes 60
python benchmarks/decoding.py runs/small --draft runs/tiny
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gateloop_transformer import Transformer, quantize
from gateloop_transformer.bench.report import about, about_line
from gateloop_transformer.bench.timing import Times, interleaved
from gateloop_transformer.data.corpus import load_corpus
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.evaluation.bits import score
from gateloop_transformer.generation import DraftReport
from gateloop_transformer.layers.quantized import KINDS, SmallLinear
from gateloop_transformer.runs.folder import METRICS, load_model, load_tokenizer, read_config

PROMPT, NEW, LONG, BLOCKS = 256, 128, 4096, (2, 4)


def clock() -> float:
    """Seconds; of the processor where one thread runs, for then other programs on the machine do not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function: Callable[[], object]) -> Callable[[], float]:
    """`function` as something that returns how long it took."""

    def run() -> float:
        start = clock()
        function()
        return clock() - start

    return run


def weights(model: Transformer) -> float:
    """Megabytes of parameters and of small weights."""
    small = [
        tensor
        for module in model.modules()
        if isinstance(module, SmallLinear)
        for tensor in (module.weight, module.scale, module.bias)
        if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *small]) / 1e6


def rate(times: dict[str, Times], name: str, first: str, tokens: int) -> str:
    """Tokens per second from medians, their spread, and the ratio to the first."""
    median, most, least = (tokens / value for value in times[name][:3])
    return f"{median:,.0f} ({least:,.0f} to {most:,.0f}) **{times[first].median / times[name].median:.2f}**"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def read_long(model: Transformer, ids: torch.Tensor) -> Callable[[], object]:
    """Reading a long prompt."""

    def run() -> None:
        model.generate(ids, 1, temperature=0)

    return run


def precision(folder: Path, text: Any, data: Any, budget: float) -> list[str]:
    """Bits per byte and speeds of each kind of weights."""
    models = {kind: quantize(load_model(folder), kind).eval() for kind in KINDS}
    bits = {kind: score(model, [data], ByteTokenizer()).bits_per_byte for kind, model in models.items()}
    prompt, long = text[:, :PROMPT], text[:, :LONG]
    state = {kind: model(prompt, return_state=True)[1] for kind, model in models.items()}
    last = prompt[:, -1:]

    def new(kind: str) -> Callable[[], object]:
        return lambda: models[kind].generate(last, NEW, temperature=0, state=state[kind])

    one = interleaved({kind: seconds(new(kind)) for kind in KINDS}, budget)
    many = interleaved({kind: seconds(read_long(models[kind], long)) for kind in KINDS}, budget)
    rows = [
        [
            kind,
            f"{weights(models[kind]):.1f}",
            f"{bits[kind]:.5f}",
            f"{bits[kind] - bits['float32']:+.5f}",
            rate(one, kind, "float32", NEW),
            rate(many, kind, "float32", LONG),
        ]
        for kind in KINDS
    ]
    head = ["weights", "MB", "bits per byte", "change", "bytes/s, batch 1", f"bytes/s, prompt of {LONG:,}"]
    return [
        "## Smaller weights",
        "",
        f"Of {describe(folder)}. Bits per byte over {len(data):,} held-out bytes, read once with the state carried.",
        "",
        *table(head, rows),
    ]


def describe(folder: Path) -> str:
    """A model in words."""
    model = read_config(folder).model
    records = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    read = max(record.get("tokens", 0) for record in records)
    return f"a model of width {model.dim} and depth {model.depth} (trained on {read / 1e6:.1f} MB)"


def drafts(folder: Path, small: list[Path], text: Any, data: Any, budget: float) -> list[str]:
    """Speed and accepted share with each draft, number of tokens, temperature and kind of weights."""
    rows = []
    with torch.no_grad():
        for kind in ("float32", "int8"):
            model = quantize(load_model(folder), kind).eval()
            candidates = [(path, quantize(load_model(path), kind).eval()) for path in small]
            for temperature in (0.0, 0.8):
                rows += compare(model, candidates, kind, temperature, text, budget)
    lines = [
        f"- {path.name}: {describe(path)}, "
        f"{score(load_model(path), [data], ByteTokenizer()).bits_per_byte:.3f} bits per byte"
        for path in [folder, *small]
    ]
    head = ["weights", "temperature", "draft", "drafted at once", "accepted", "bytes/s"]
    return [
        "## Drafted tokens",
        "",
        f"{NEW} bytes after {PROMPT}, one row; both models with the same weights. The models, the large one first:",
        "",
        *lines,
        "",
        "Accepted: share of all drafted bytes that became text. At temperature 0 a model that is little trained",
        "repeats itself, which any draft guesses: temperature 0.8 is nearer to what drafts are for.",
        "",
        *table(head, rows),
    ]


def compare(
    model: Transformer, small: list[tuple[Path, Transformer]], kind: str, temperature: float, text: Any, budget: float
) -> list[list[str]]:
    """Rows for one kind and temperature: without a draft, and with each, in turn on several prompts."""
    reports: dict[str, DraftReport] = {"none": DraftReport()}
    settings: dict[str, dict[str, Any]] = {"none": {}}
    for path, draft in small:
        for tokens in BLOCKS:
            name = f"{path.name}|{tokens}"
            reports[name] = DraftReport()
            settings[name] = {"draft": draft, "draft_tokens": tokens, "draft_report": reports[name]}
    spent = dict.fromkeys(settings, 0)

    def run(name: str) -> Callable[[], float]:
        def once() -> float:
            # Each time another place in the text, the same for all.
            start = 1000 * spent[name] % (text.shape[1] - PROMPT)
            spent[name] += 1
            prompt = text[:, start : start + PROMPT]
            begin = clock()
            model.generate(prompt, NEW, temperature=temperature, seed=spent[name], **settings[name])
            return clock() - begin

        return once

    times = interleaved({name: run(name) for name in settings}, budget * len(settings) / 3)
    rows = []
    for name in settings:
        path, _, tokens = name.partition("|")
        share = f"{reports[name].rate:.0%}" if tokens else ""
        rows.append([kind, f"{temperature:g}", path, tokens, share, rate(times, name, "none", NEW)])
    return rows


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a run")
    parser.add_argument("--draft", type=Path, action="append", default=[], help="folder of a smaller model's run")
    parser.add_argument("--out", type=Path, default=Path("docs/results/decoding.md"), help="the page")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each three candidates")
    parser.add_argument("--bytes", type=int, default=200_000, help="of held-out text for bits per byte")
    arguments = parser.parse_args()
    config = read_config(arguments.model)
    corpus = load_corpus(
        config.data,
        valid_fraction=config.training.valid_fraction,
        context=config.training.context,
        tokenizer=load_tokenizer(arguments.model),
        field=config.field,
    )
    data = corpus.valid.read(0, min(arguments.bytes, len(corpus.valid)))
    text = torch.from_numpy(corpus.valid.read(0, min(max(LONG, 20_000), len(corpus.valid)))).unsqueeze(0)
    facts, whose = about(), "the processor" if torch.get_num_threads() == 1 else "the clock"
    lines = [
        "# Decoding",
        "",
        "Generated by benchmarks/decoding.py; not to be edited.",
        "",
        f"{about_line(facts)}; commit {facts['commit']}.",
        "",
        "Speeds: median (least to most) and, in bold, the ratio to the first row of its group. Candidates of a group",
        f"ran in turn. Higher is better. Seconds are those of {whose}.",
        "",
    ]
    with torch.no_grad():
        lines += precision(arguments.model, text, data, arguments.seconds)
        if arguments.draft:
            lines += ["", *drafts(arguments.model, arguments.draft, text, data, arguments.seconds)]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
