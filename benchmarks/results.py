"""Tables and figures of docs/results from the rows that are committed there as JSON: language.md, tasks.md and PNGs.

make results
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import draw_losses, draw_tasks, draw_windows

RESULTS = Path(__file__).parent.parent / "docs" / "results"
NAMES = {
    "gateloop": "GateLoop",
    "original": "gateloop-transformer 0.2.5",
    "transformer": "Transformer (Llama: RoPE, SwiGLU)",
    "mamba": "Mamba (mambapy)",
    "mingru": "minGRU (minGRU-pytorch)",
    "lstm": "nn.LSTM",
    "gru": "nn.GRU",
}
TITLES = {
    "shakespeare": "Tiny-shakespeare, characters, 0.8 M parameters: 2,000 steps of 12 windows of 64",
    "shakespeare-seconds": "The same with equal CPU time",
    "shakespeare-carried": "The same with states carried from window to window",
    "library": "Default corpus (Python sources), bytes, 1 M parameters: 700 steps of 8 windows of 256",
    "books": "Books, bytes, 3 M parameters: 1,200 CPU seconds, windows of 256, other authors held out",
    "books-rates": "Where the learning rates for the books come from: 180 CPU seconds each",
}
# The weight decay of most runs.
DECAY = 0.1
# Tables of one thing changed at a time.
CHANGES = {
    "ablations": "The recipe with gates of full rank, one thing changed: tiny-shakespeare, 1,000 steps, one seed",
    "books-ablations": "Forms of the model on books: 3 M parameters, 180 CPU seconds, one seed",
}

# What is to be known of a task's figures.
NOTES = {
    "S5": "Not solved, and not to be: diagonal gates commute, the permutations do not. A fixed number of such layers "
    "is believed not to track the words of S5, whose word problem is complete for NC1; short ones it can learn.",
    "memory horizon": "One layer. Spans are drawn log-uniformly, so the last answer of a sequence is mostly near: the "
    "second table tells more.",
    "memory horizon, all lengths from the start": "Without the sequences that grow, gates that start at short memories "
    "must find the long ones at once.",
}


def read(name: str) -> dict[str, Any] | None:
    """A file of rows, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def loss_of(row: dict[str, Any]) -> float:
    """The validation loss, infinite where a run diverged: nothing is less than what is no number."""
    return math.inf if math.isnan(row["val_loss"]) else float(row["val_loss"])


def best_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one model in the form, at the learning rate and weight decay whose first seed was best."""
    first = min(row["seed"] for row in rows)
    best = min((row for row in rows if row["seed"] == first), key=loss_of)
    return [row for row in rows if all(row[name] == best[name] for name in ("options", "lr", "weight_decay"))]


def spread(values: list[float], digits: int) -> str:
    """Mean ± deviation, or the one value."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """A line a model, the best first; then all learning rates."""
    models = sorted({row["model"] for row in rows})
    chosen = {model: best_rate([row for row in rows if row["model"] == model]) for model in models}
    order = sorted(models, key=lambda model: statistics.fmean(map(loss_of, chosen[model])))
    lines = [
        "| model | parameters | learning rate | weight decay | seeds | validation loss (nats) | bits per byte | tokens "
        "| CPU seconds | tokens/s | memory (MiB) | decoding (tokens/s) |",
        "|" + "---|" * 12,
    ]
    for model in order:
        found = chosen[model]
        middle = {
            name: statistics.median(row[name] for row in found)
            for name in ("tokens", "seconds", "tokens_per_second", "memory_mib", "decoding_tokens_per_second")
        }
        lines.append(
            f"| {NAMES[model]} | {found[0]['parameters']:,} | {found[0]['lr']:g} | {found[0]['weight_decay']:g} | "
            f"{len(found)} | "
            f"{spread([row['val_loss'] for row in found], 3)} | {spread([row['bits_per_byte'] for row in found], 3)} | "
            f"{middle['tokens']:,.0f} | {middle['seconds']:.0f} | {middle['tokens_per_second']:,.0f} | "
            f"{middle['memory_mib']:,.0f} | {middle['decoding_tokens_per_second']:,.0f} |"
        )
    widths = sorted({row.get("precision", "float32") for row in rows})
    lines += [
        "",
        f"Matrix products in training: {', '.join(widths)}. All runs with the first seed, by learning rate:",
        "",
    ]
    for model in order:
        first = [row for row in rows if row["model"] == model and row["seed"] == 0]
        forms = list({json.dumps(row["options"]): row["options"] for row in first}.values())
        for form in forms:
            # What tells it from the others.
            own = {name: value for name, value in form.items() if any(other.get(name) != value for other in forms)}
            sizes = ", ".join(f"{name} {value}" for name, value in own.items())
            tried = sorted((row["lr"], row["weight_decay"], row["val_loss"]) for row in first if row["options"] == form)
            lines.append(
                f"- {NAMES[model]}{f' ({sizes})' if sizes else ''}: "
                + ", ".join(
                    f"{lr:g}{'' if decay == DECAY else f' (weight decay {decay:g})'}: {loss:.3f}"
                    for lr, decay, loss in tried
                )
            )
    return lines


def far_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of books that were read in long windows, by the model's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for group, suffix in (("books", ""), ("books-carried", ", states carried")):
        rows = (read(group) or {"rows": []})["rows"]
        for model in sorted({row["model"] for row in rows}):
            best = best_rate([row for row in rows if row["model"] == model])
            if far := [row for row in best if "by_window" in row]:
                depth = far[0]["options"].get("depth")
                found[NAMES[model] + (f", {depth} layers" if depth else "") + suffix] = far
    return found


def by_window(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Bits per byte of all seeds by the tokens of a window."""
    return {size: [row["by_window"][size] / math.log(2) for row in rows] for size in rows[0]["by_window"]}


def by_position(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Bits per byte of all seeds by how many tokens of the window were read before."""
    spans = [f"{span['from']:,}–{span['to']:,}" for span in rows[0]["by_position"]]
    losses = [[span["loss"] / math.log(2) for span in row["by_position"]] for row in rows]
    return dict(zip(spans, map(list, zip(*losses, strict=True)), strict=True))


def reach(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The section on windows longer than in training."""
    return [
        "",
        "## What more context than in training is worth",
        "",
        "Bits per byte of one held-out text, cut into windows of so many tokens, each read from an empty state, by the",
        "models of books (trained on windows of 256; with states carried: from window to window, the gradient ends",
        "where a window starts). The last column is 64 times the training length.",
        *losses_table(found, by_window),
        "",
        "The same by how many tokens of the window were read before, from the shortest windows that have as many.",
        *losses_table(found, by_position),
        "",
        "![by window](context.png)",
    ]


def losses_table(found: dict[str, list[dict[str, Any]]], losses: Callable[..., dict[str, list[float]]]) -> list[str]:
    """A line a model, a column a size or span."""
    columns = list(losses(next(iter(found.values()))))
    lines = ["", "| model | seeds | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for name, rows in found.items():
        cells = [spread(each, 3) for each in losses(rows).values()]
        lines.append(f"| {name} | {', '.join(str(row['seed']) for row in rows)} | " + " | ".join(cells) + " |")
    return lines


def ablations(rows: list[dict[str, Any]]) -> list[str]:
    """A line a change, the best first."""
    base = next(row for row in rows if row["label"] == "recipe")["val_loss"]
    lines = [
        "| change | learning rate | validation loss (nats) | against the recipe | parameters | tokens/s |",
        "|" + "---|" * 6,
    ]
    lines += [
        f"| {row['label']} | {row['lr']:g} | {row['val_loss']:.3f} | {row['val_loss'] - base:+.3f} | "
        f"{row['parameters']:,} | {row['tokens_per_second']:,.0f} |"
        for row in sorted(rows, key=loss_of)
    ]
    return lines


def source(file: dict[str, Any]) -> list[str]:
    """Where a table's rows are from."""
    row = file["rows"][0]
    machine, commits = row["machine"], sorted({row["commit"] for row in file["rows"]})
    return [
        "",
        f"Command: `{file['command']}`; {file['processes_at_a_time']} runs at a time, of one thread each. "
        f"Commits: {', '.join(commits)}. Machine: {machine['processor']}, {machine['cores']} cores. "
        f"Data: {row['data']}, SHA-256 {row['data_sha256'][:16]}….",
        "",
    ]


def language() -> str:
    """The page of language models."""
    lines = [
        "# Language models compared",
        "",
        "Generated by `make results` from the JSON files beside this page, which hold every run with all its settings.",
        "Baselines are the packages' own models in an environment of their own, or torch's layers. All are trained by",
        "one script (benchmarks/language/train_one.py): AdamW, the same windows in the same order, a cosine to 0, each",
        "in the forms, at the learning rates and weight decays listed (0.1 where none is), then the best with the",
        "seeds of the table: mean ± standard deviation. (Carried states take the best of the first table, books at",
        "1,200 seconds that of the search at 180.) Seconds are of the process, one thread. Validation reads all",
        "held-out text, of books evenly spread windows.",
        "",
        "![bits per byte](language.png)",
    ]
    for name, title in TITLES.items():
        if (file := read(name)) and file["rows"]:
            lines += ["", f"## {title}", "", *comparison(file["rows"]), *source(file)]
    if found := far_rows():
        lines += reach(found)
    for name, title in CHANGES.items():
        if (file := read(name)) and any(row["label"] == "recipe" for row in file["rows"]):
            lines += ["", f"## {title}", "", *ablations(file["rows"]), *source(file)]
    return "\n".join(lines).rstrip() + "\n"


def _percent(values: list[float]) -> str:
    """The mean, and of several the least and most."""
    mean = f"{statistics.fmean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def tasks(rows: list[dict[str, Any]]) -> list[str]:
    """A table a task: a line a kind of gate, a column a length, then a column a span."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        lengths = list(own[0]["accuracy_by_length"])
        lines += [
            "",
            f"## {name[0].upper() + name[1:]}",
            "",
            f"Trained to length {max(row['trained_lengths'][1] for row in own)} at most; a guess is right in "
            f"{own[0]['chance']:.1%}.{' ' + NOTES[name] if name in NOTES else ''}",
            "",
            "| gates | seeds | seconds | " + " | ".join(f"{int(length):,}" for length in lengths) + " |",
            "|" + "---|" * (3 + len(lengths)),
        ]
        for kind in dict.fromkeys(row["kind"] for row in own):
            found = [row for row in own if row["kind"] == kind]
            cells = [_percent([row["accuracy_by_length"][length] for row in found]) for length in lengths]
            seconds = statistics.median(row["seconds"] for row in found)
            lines.append(f"| {kind} | {len(found)} | {seconds:.0f} | " + " | ".join(cells) + " |")
        if spans := own[0].get("accuracy_by_span"):
            lines += ["", "| gates, by span | " + " | ".join(spans) + " |", "|" + "---|" * (1 + len(spans))]
            for kind in dict.fromkeys(row["kind"] for row in own):
                found = [row for row in own if row["kind"] == kind]
                cells = [_percent([row["accuracy_by_span"][span] for row in found]) for span in spans]
                lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines += [
            "",
            *(f"- `{command}`" for command in dict.fromkeys(row["command"] for row in own if row["seed"] == 0)),
        ]
    return lines


def tasks_page() -> str | None:
    """The page of synthetic tasks."""
    if (file := read("tasks")) is None or not file["rows"]:
        return None
    machine = file["rows"][0]["machine"]
    lines = [
        "# Synthetic tasks",
        "",
        "Generated by `make results` from tasks.json beside this page, which `python benchmarks/tasks.py` fills by",
        "running the commands below. Columns are lengths; numbers the share of last answers that are right, the mean",
        f"over seeds with the least and most. {machine['processor']}, {machine['cores']} cores, one thread each. "
        f"Commits: {', '.join(sorted({row['commit'] for row in file['rows']}))}.",
        "",
        "![accuracy](tasks.png)",
        *tasks(file["rows"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def losses() -> dict[str, dict[str, list[float]]]:
    """Bits per byte by table and model, of the tables that are not a search for learning rates."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, title in TITLES.items():
        rows = [] if name.endswith("-rates") else (read(name) or {"rows": []})["rows"]
        for model in sorted({row["model"] for row in rows}):
            best = best_rate([row for row in rows if row["model"] == model])
            found.setdefault(title, {})[NAMES[model]] = [row["bits_per_byte"] for row in best]
    return found


def main() -> None:
    """All pages and figures whose rows are there."""
    (RESULTS / "language.md").write_text(language(), encoding="utf-8")
    draw_losses(losses(), RESULTS / "language.png")
    if found := far_rows():
        means = {
            name: {int(size): statistics.fmean(losses) for size, losses in by_window(rows).items()}
            for name, rows in found.items()
        }
        draw_windows(means, 256, RESULTS / "context.png")
    if (page := tasks_page()) is not None:
        (RESULTS / "tasks.md").write_text(page, encoding="utf-8")
        draw_tasks((read("tasks") or {"rows": []})["rows"], RESULTS / "tasks.png")


if __name__ == "__main__":
    main()
