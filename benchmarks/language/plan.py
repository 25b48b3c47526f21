"""The comparisons of language models: which runs there are, and running those that have no row yet.

python benchmarks/language/plan.py shakespeare --data tinyshakespeare.txt --peers .venv-peers/bin/python --jobs 2

Every model is trained in each of its forms at each of its learning rates with seed 0, the best of them also with less
and with more weight decay where the group says so, then the best of all with the other seeds; ablations change one
thing of the recipe and are trained once. A row is kept in docs/results/NAME.json as soon as its run ends, so what was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gateloop_transformer import configuration
from gateloop_transformer.bench.report import about
from gateloop_transformer.files import write_text

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "docs" / "results"
SEEDS = (0, 1, 2)

# The recommended recipe: mixers alone, a gate for each channel; within 2 % of 0.8 M parameters on 65 characters. Once
# with gates of full rank, as it was when one thing of it was changed at a time.
FULL_RANK: dict[str, Any] = {**configuration.RECIPE, "max_memory": 16, "depth": 4, "dim": 166}
RECIPE: dict[str, Any] = {**FULL_RANK, "gate_rank": 16, "dim": 192}
# A model may have several forms.
SMALL: dict[str, list[dict[str, Any]]] = {
    "gateloop": [RECIPE],
    "transformer": [
        {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 4, "num_attention_heads": 4},
    ],
    "original": [{"dim": 114, "depth": 4}],
    "mingru": [{"dim": 120, "depth": 4, "enable_conv": True}],
    "mamba": [{"d_model": 136, "n_layers": 6}],
    "lstm": [{"dim": 308, "depth": 1}, {"dim": 219, "depth": 2}, {"dim": 179, "depth": 3}],
    "gru": [{"dim": 354, "depth": 1}, {"dim": 252, "depth": 2}, {"dim": 206, "depth": 3}],
}
# Where time is the budget: fewer and wider layers too, which learn less from a token, but see more tokens.
FAST: dict[str, list[dict[str, Any]]] = {
    **SMALL,
    "gateloop": [RECIPE, {**RECIPE, "depth": 2, "dim": 272}],
    "gru": SMALL["gru"][1:2],
}
# Products in bfloat16 harm them: minGRU's scan is in log space (1.80 nats after 180 s where 1.62 is 2,000 steps').
FLOAT32 = ("mingru",)
# Learning rates that each is trained at.
RATES: dict[str, tuple[float, ...]] = {
    "gateloop": (4e-3, 6e-3, 8e-3),
    "transformer": (1e-3, 2e-3, 4e-3),
    "original": (2e-3, 4e-3, 8e-3),
    "mingru": (2e-3, 4e-3, 8e-3),
    "mamba": (2e-3, 4e-3, 8e-3),
    "lstm": (4e-3, 8e-3, 1.6e-2),
    "gru": (2e-3, 4e-3, 8e-3),
}
# Weight decays that the best form and learning rate of models that are near the best is trained with besides.
OTHER_DECAYS = dict.fromkeys(("gateloop", "lstm", "gru"), (0.03, 0.3))
# Larger models want smaller ones: lower rates where the least was best.
LARGE_RATES = RATES | {
    "gateloop": (2e-3, *RATES["gateloop"]),
    "transformer": (5e-4, *RATES["transformer"]),
    "original": (5e-4, 1e-3, *RATES["original"]),
    "mamba": (1e-3, *RATES["mamba"]),
}
# Within 1 % of 3 M parameters on bytes.
LARGE: dict[str, list[dict[str, Any]]] = {
    "gateloop": [{**RECIPE, "max_memory": 64, "depth": 5, "dim": 330, "gate_rank": 20}],
    "transformer": [
        {"hidden_size": 216, "intermediate_size": 600, "num_hidden_layers": 5, "num_attention_heads": 4},
    ],
    "original": [{"dim": 196, "depth": 5}],
    "mingru": [{"dim": 206, "depth": 5, "enable_conv": True}],
    "mamba": [{"d_model": 232, "n_layers": 8}],
    "lstm": [{"dim": 416, "depth": 2}, {"dim": 342, "depth": 3}],
    "gru": [{"dim": 480, "depth": 2}],
}
# The preset `tiny` and, within 2 % of its 1.02 M parameters on bytes, others.
PRESET: dict[str, list[dict[str, Any]]] = {
    "gateloop": [{**RECIPE, "max_memory": 64, "dim": 208}],
    "transformer": [
        {"hidden_size": 144, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    ],
    "original": [{"dim": 126, "depth": 4}],
    "mingru": [{"dim": 132, "depth": 4, "enable_conv": True}],
    "lstm": [{"dim": 236, "depth": 2}, {"dim": 195, "depth": 3}],
    "gru": [{"dim": 270, "depth": 2}],
}
_HEADS = {"dim": 188, "head_norm": True}
# The recipe with one thing changed; where that changes the number of parameters the width makes up for it, as far as
# heads of its size allow (heads of 64: 3 % fewer).
ABLATIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "gate: paper, no input scale": {"gate": "paper", "spread_start": True},
    "gate: polar (the original's)": {"gate": "polar"},
    "start: memories of two steps": {"spread_start": False},
    "start: memories up to 64 steps": {"max_memory": 64},
    "gates of rank 4": {"gate_rank": 4, "dim": 195},
    "gates of rank 16 (now the recipe)": {"gate_rank": 16, "dim": 191},
    "gates of rank 32": {"gate_rank": 32, "dim": 187},
    "real gates": {"ablate_complex": True},
    "fixed gates (LRU)": {"fixed_gates": True, "dim": 196},
    "gates of 1": {"ablate_state_transition": True},
    "heads of 2": {"dim": 180, "gate_loop_heads": 90, "head_norm": True},
    "heads of 4": {**_HEADS, "gate_loop_heads": 47},
    "heads of 4, no output norm": {**_HEADS, "gate_loop_heads": 47, "head_norm": False},
    "heads of 4, normed q and k": {**_HEADS, "gate_loop_heads": 47, "qk_norm": True},
    "heads of 16": {"dim": 192, "gate_loop_heads": 12, "head_norm": True},
    "heads of 64": {"dim": 192, "gate_loop_heads": 3, "head_norm": True},
    "one head of 196": {"dim": 196, "gate_loop_heads": 1, "head_norm": True},
    "no convolution": {"conv_size": 0, "conv_silu": False},
    "convolution that starts as the identity, no SiLU": {"conv_silu": False},
    "no biases": {"qkv_bias": False},
    "no SiLU gate on the output": {"attn_add_swish_gating": False, "dim": 196},
    "feed-forward of width 1": {"ff_mult": 1, "dim": 146},
    "feed-forward of width 4": {"ff_mult": 4, "dim": 114},
    "last layer attention": {
        "layer_pattern": "gate gate gate attention",
        "heads": 4,
        "dim_head": 44,
        "dim": 172,
        "rotary_emb": True,
    },
}
# Forms of the model at 3 M parameters; a learning rate of their own is beside the options.
_FEEDFORWARDS = {"gate": "ring", "conv_size": 4, "head_norm": True, "gate_loop_heads": 7, "max_memory": 64}
LARGE_ABLATIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "recipe, gates of full rank": {"gate_rank": None, "dim": 284},
    "recipe, 3 layers": {"depth": 3, "dim": 424},
    "recipe, 10 layers": {"depth": 10, "dim": 232},
    "recipe, heads of 32": {"dim": 334, "dim_gate_looped_attn": 320, "gate_loop_heads": 10, "head_norm": True},
    "recipe, feed-forward of width 4": {"ff_mult": 4, "dim": 208},
}
_OWN_FORMS: dict[str, dict[str, Any]] = {
    f"heads of 30, feed-forward of width 4, convolution that starts as the identity, learning rate {lr:g}": {
        **_FEEDFORWARDS,
        "depth": 5,
        "dim": 210,
        "lr": lr,
    }
    for lr in (1e-3, 2e-3, 4e-3)
}


def _changed(options: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Options with others in their place; None takes one away."""
    return {name: value for name, value in {**options, **change}.items() if value is not None}


# nanoGPT's setting on a CPU; character level.
_SHAKESPEARE = {"context": 64, "batch": 12, "characters": True, "weight_decay": 0.1}
_BYTES: dict[str, Any] = {"context": 256, "batch": 8, "characters": False, "weight_decay": 0.1}
_BOOKS = {**_BYTES, "steps": None, "precision": "bfloat16"}
# Where time is the budget products are in bfloat16, with which all are faster; FLOAT32 are harmed. `rates_from`
# names the group whose best form and learning rate are taken, `decays` what else the best is trained with, `seeds`
# those that follow the first.
GROUPS: dict[str, dict[str, Any]] = {
    "shakespeare": {
        "sizes": SMALL,
        "decays": OTHER_DECAYS,
        "seeds": (1, 2, 3, 4),
        "settings": {**_SHAKESPEARE, "steps": 2000},
    },
    "shakespeare-seconds": {
        "sizes": FAST,
        "decays": OTHER_DECAYS,
        "settings": {**_SHAKESPEARE, "steps": None, "cpu_seconds": 180, "precision": "bfloat16"},
    },
    # What `make demo` trains, on the same text (library.py writes it).
    "library": {
        "sizes": PRESET,
        "rates": RATES
        | {
            "gateloop": (*RATES["gateloop"], 1.2e-2),
            "transformer": (2.5e-4, 5e-4, *RATES["transformer"]),
            "lstm": (*RATES["lstm"], 3.2e-2),
        },
        "settings": {**_BYTES, "steps": 700, "eval_tokens": 524288},
    },
    "books-rates": {
        "sizes": LARGE,
        "rates": LARGE_RATES,
        "seeds": (),
        "settings": {**_BOOKS, "cpu_seconds": 180, "eval_tokens": 131072},
    },
    "books": {
        "sizes": LARGE,
        "seeds": SEEDS[1:],
        "rates_from": "books-rates",
        "settings": {**_BOOKS, "cpu_seconds": 1200, "eval_tokens": 524288, "reach": 64},
    },
    "books-carried": {
        "sizes": {"gateloop": LARGE["gateloop"]},
        "seeds": (),
        "rates_from": "books-rates",
        "settings": {**_BOOKS, "cpu_seconds": 1200, "eval_tokens": 524288, "reach": 64, "carry_state": True},
    },
    "books-ablations": {
        "changes": {name: _changed(LARGE["gateloop"][0], change) for name, change in LARGE_ABLATIONS.items()}
        | _OWN_FORMS,
        "settings": {**_BOOKS, "cpu_seconds": 180, "eval_tokens": 131072, "lr": 4e-3, "seed": 0},
    },
    "shakespeare-carried": {
        "sizes": {name: SMALL[name] for name in ("gateloop", "lstm", "gru")},
        "rates_from": "shakespeare",
        "settings": {**_SHAKESPEARE, "steps": 2000, "carry_state": True},
    },
    "ablations": {
        "changes": {name: {**FULL_RANK, **change} for name, change in ABLATIONS.items()},
        "settings": {**_SHAKESPEARE, "steps": 1000, "lr": 6e-3, "seed": 0},
    },
}


def key(row: dict[str, Any]) -> str:
    """What tells one run from another: the model and what it is given."""
    given = [row.get("cpu_seconds") or row["steps"], row["context"], row["batch"], bool(row.get("carry_state"))]
    given += [row.get("precision", "float32"), row["weight_decay"]]
    return json.dumps([row["model"], row["options"], row["lr"], row["seed"], *given], sort_keys=True)


def loss_of(row: dict[str, Any]) -> float:
    """The validation loss, infinite where a run diverged: nothing is less than what is no number."""
    return math.inf if math.isnan(row["val_loss"]) else float(row["val_loss"])


def read_rows(group: str) -> list[dict[str, Any]]:
    """The rows that a group has."""
    path = RESULTS / f"{group}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def first_runs(group: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """What a model is trained with once: all of its forms and learning rates, or what was best in another group.

    Raises:
        SystemExit: that group has no row of the model.
    """
    forms: list[dict[str, Any]] = group["sizes"][model]
    if (other := group.get("rates_from")) is None:
        rates = group.get("rates", RATES)[model]
        return [{"options": form, "lr": lr} for form, lr in itertools.product(forms, rates)]
    rows = [row for row in read_rows(other) if row["model"] == model and row["seed"] == SEEDS[0]]
    rows = [row for row in rows if row["options"] in forms]
    if not rows:
        raise SystemExit(f"plan: {model} has no row in {other}, whose best learning rate is wanted: run that first")
    best = min(rows, key=loss_of)
    return [{"options": best["options"], "lr": best["lr"], "weight_decay": best["weight_decay"]}]


def missing(group: dict[str, Any], rows: list[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    """Runs that can be started: all forms and learning rates, then other weight decays, of the best the other seeds."""
    done = {key(row) for row in rows}

    def without_row(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [spec for spec in specs if key(spec) not in done]

    if "changes" in group:
        specs = []
        for name in models:
            options = dict(group["changes"][name])
            own = {"lr": options.pop("lr")} if "lr" in options else {}
            specs.append({**group["settings"], **own, "model": "gateloop", "label": name, "options": options})
        return without_row(specs)
    found = []
    for model in models:
        base = {**group["settings"], "model": model}
        if model in FLOAT32:
            base["precision"] = "float32"
        tried = [{**base, **given, "seed": SEEDS[0]} for given in first_runs(group, model)]
        if not (left := without_row(tried)):
            best = _best(tried, rows)
            tried += [{**best, "weight_decay": decay} for decay in group.get("decays", {}).get(model, ())]
            left = without_row(tried)
        if not left:
            best = _best(tried, rows)
            left = without_row([{**best, "seed": seed} for seed in group.get("seeds", SEEDS[1:])])
        found += left
    return found


def _best(specs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """That of some runs, all done, which ended at the least validation loss."""
    losses = {key(row): loss_of(row) for row in rows}
    return min(specs, key=lambda spec: losses[key(spec)])


def execute(spec: dict[str, Any], python: str) -> dict[str, Any]:
    """One run in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | threads
    command = [python, str(HERE / "train_one.py"), json.dumps(spec)]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        raise RuntimeError(f"{spec['model']} failed:\n{result.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row


def command_of(row: dict[str, Any]) -> str:
    """The command that gives a row again, in the repository with the texts beside it."""
    names = ("model", "options", "context", "batch", "characters", "cpu_seconds", "precision", "carry_state", "lr")
    names += ("weight_decay", "seed", "data", "valid", "eval_tokens", "reach")
    # Where seconds are the budget, the steps are what came of it.
    steps = None if row.get("cpu_seconds") else row["steps"]
    spec = {"steps": steps, **{name: row[name] for name in names if row.get(name) is not None}}
    folder = ".venv" if row["model"] == "gateloop" else ".venv-peers"
    return f"OMP_NUM_THREADS=1 {folder}/bin/python benchmarks/language/train_one.py {shlex.quote(json.dumps(spec))}"


def write(path: Path, rows: list[dict[str, Any]], command: str, jobs: int) -> None:
    """All rows, whole or not at all."""
    rows = [{**row, "command": command_of(row)} for row in rows]
    rows.sort(key=lambda row: (row["model"], row["lr"], row["seed"]))
    text = json.dumps({"command": command, "processes_at_a_time": jobs, "rows": rows}, indent=1)
    write_text(path, text + "\n")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=sorted(GROUPS))
    parser.add_argument("--data", required=True, help="the text; without --valid its last tenth is held out")
    parser.add_argument("--valid", help="validation text")
    parser.add_argument("--peers", required=True, help="interpreter of the environment that has the other models")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each (default 1)")
    parser.add_argument("--models", nargs="+", help="only these models, or these ablations")
    parser.add_argument("--seeds", type=int, help="of each at its best learning rate, at most (default: the group's)")
    options = parser.parse_args()
    group, path = GROUPS[options.group], RESULTS / f"{options.group}.json"
    if options.seeds is not None:
        group = {**group, "seeds": group.get("seeds", SEEDS[1:])[: max(0, options.seeds - 1)]}
    models = options.models or list(group.get("changes") or group["sizes"])
    rows = read_rows(options.group)
    data = {"data": options.data, "valid": options.valid}
    machine = about()
    valid = f" --valid {Path(options.valid).name}" if options.valid else ""
    arguments = f"{options.group} --data {Path(options.data).name}{valid} --peers .venv-peers/bin/python"
    command = f"python benchmarks/language/plan.py {arguments}"
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        while specs := missing(group, rows, models):
            running = {
                pool.submit(execute, {**spec, **data}, sys.executable if spec["model"] == "gateloop" else options.peers)
                for spec in specs
            }
            failed = []
            for future in concurrent.futures.as_completed(running):
                # The rows of the others are kept first.
                if (error := future.exception()) is not None:
                    failed.append(error)
                    continue
                row = future.result()
                row["data"] = Path(row["data"]).name
                row["valid"] = Path(row["valid"]).name if row["valid"] else None
                row["gate"] = row["options"].get("gate")
                row["commit"], row["machine"] = machine["commit"], machine["machine"]
                rows.append(row)
                write(path, rows, command, options.jobs)
                print(
                    f"{row.get('label', row['model']):12} lr {row['lr']:<7g} seed {row['seed']}  {row['val_loss']:.4f}",
                    flush=True,
                )
            if failed:
                raise failed[0]


if __name__ == "__main__":
    main()
