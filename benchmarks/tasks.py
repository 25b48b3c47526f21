"""Synthetic tasks by kind of gate: runs `gateloop tasks` for every row that docs/results/tasks.json lacks.

python benchmarks/tasks.py [TASK ...] --jobs 2
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gateloop_transformer.bench.report import about
from gateloop_transformer.files import write_text

PATH = Path(__file__).parent.parent / "docs" / "results" / "tasks.json"
SEEDS = (0, 1, 2)
# Kinds of gates, as flags.
KINDS: dict[str, list[str]] = {
    "ring (complex)": [],
    "positive gates": ["--ablate-complex"],
    "signed gates": ["--gate", "polar", "--ablate-complex"],
    "fixed gates (LRU)": ["--fixed-gates"],
    "polar (the original's)": ["--gate", "polar"],
    "ring, the original's start": ["--no-spread-start"],
}
TRACKING = ["ring (complex)", "positive gates", "signed gates", "fixed gates (LRU)", "polar (the original's)"]
MEMORY = ["ring (complex)", "fixed gates (LRU)", "polar (the original's)"]
STARTS = [*MEMORY, "ring, the original's start"]
# What is run: a name, the command's arguments, kinds of gates.
PLAN: dict[str, tuple[list[str], list[str]]] = {
    "parity": (["parity"], TRACKING),
    "counting modulo 3": (["counting", "--modulus", "3"], TRACKING),
    "counting modulo 5": (["counting", "--modulus", "5"], TRACKING),
    "counting modulo 60": (["counting", "--modulus", "60"], ["ring (complex)"]),
    "modular arithmetic": (["arithmetic"], ["ring (complex)", "positive gates"]),
    "S5": (["s5"], ["ring (complex)"]),
    "memory horizon": (["horizon"], STARTS),
    "memory horizon, all lengths from the start": (["horizon", "--first", "256"], STARTS),
    "selective copying": (["copying"], STARTS),
    "associative recall": (["recall"], MEMORY),
    "induction heads": (["induction"], MEMORY),
    "ListOps": (["listops"], MEMORY),
    "digits, in order": (["digits"], MEMORY),
    "digits, permuted": (["permuted-digits"], MEMORY),
}


def execute(name: str, kind: str, seed: int) -> dict[str, Any]:
    """One run in a process of its own, of one thread.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*PLAN[name][0], *KINDS[kind], "--seed", str(seed)]
        command = [sys.executable, "-m", "gateloop_transformer", "tasks", *arguments, "--json", "--out", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        raise RuntimeError(f"{name}, {kind}: {result.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(result.stdout)
    return {"name": name, "kind": kind, "command": "gateloop tasks " + " ".join(arguments), **row}


def write(rows: list[dict[str, Any]]) -> None:
    """All rows, whole or not at all."""
    order = list(PLAN)
    rows = sorted(rows, key=lambda row: (order.index(row["name"]), list(KINDS).index(row["kind"]), row["seed"]))
    write_text(PATH, json.dumps({"rows": rows}, indent=1) + "\n")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PLAN], help="only these")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="only these kinds of gates")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"of each (default {len(SEEDS)})")
    options = parser.parse_args()
    rows = json.loads(PATH.read_text(encoding="utf-8"))["rows"] if PATH.exists() else []
    done = {(row["name"], row["kind"], row["seed"]) for row in rows}
    machine = about()
    wanted = [
        (name, kind, seed)
        for seed in SEEDS[: options.seeds]
        for name in options.names or PLAN
        for kind in PLAN[name][1]
        if kind in (options.kinds or KINDS) and (name, kind, seed) not in done
    ]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        failed = []
        for future in concurrent.futures.as_completed([pool.submit(execute, *each) for each in wanted]):
            # The rows of the others are kept first.
            if (error := future.exception()) is not None:
                failed.append(error)
                continue
            row = future.result()
            rows.append({**row, "commit": machine["commit"], "machine": machine["machine"]})
            write(rows)
            print(f"{row['name']}, {row['kind']}, seed {row['seed']}: {row['accuracy_by_length']}", flush=True)
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main()
