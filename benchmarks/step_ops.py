"""What one training step launches on CUDA, counted on the CPU: operators, autograd nodes, copies and waits.

python -m benchmarks.step_ops [--json] [--kinds …] [--datasets …] [--out FILE.md]

Models of real kinds of layers and tiny widths are trained for a few steps with the layout, the blocks of the
loss and the kernels of CUDA; a step of 34 layers follows from those of two and three. Seconds of the host are
the slope over layers of the process's time on rows of few tokens, without the time inside the CPU's twins of
kernels and inside matrix products, which stand for launches. TRL, PEFT and bitsandbytes train on the same rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.models import ROOT, TINY_VOCABULARY
from benchmarks.harness.rows import STEP_ROWS
from benchmarks.harness.tiny import (
    DATASETS,
    KINDS,
    NARROWEST,
    REAL_VOCABULARY,
    SHORT,
    SIZES,
    tiny_model,
    write_tiny_rows,
)

NUM_LAYERS = 34  # of Gemma-3-4b
FEWER, MORE = 2, 3
FEWER_TIMED, MORE_TIMED = 2, 6
COUNTED_STEPS, TIMED_STEPS, TIMED_RUNS = 4, 64, 4
CAPABILITY = "9.0"
BY_NAME = "operators_per_layer"
Figures = dict[str, Any]


def main() -> None:
    """Count → a table, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the table, and the object beside it")
    arguments = parser.parse_args()
    found = count(ROOT / ".bench" / "step_ops", arguments.kinds, arguments.datasets)
    table = as_table(found)
    print(json.dumps(found) if arguments.json else table)
    if arguments.out:
        command = " ".join(["python -m benchmarks.step_ops", *sys.argv[1:]])
        arguments.out.write_text(f"`{command}`\n\n{table}\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def count(folder: Path, kinds: list[str], datasets: list[str]) -> Figures:
    """Figures of halfbyte by kind and dataset, those of TRL on the first kind, and their ratio of host time."""
    found: Figures = {
        kind: {dataset: figures(folder, "halfbyte", kind, dataset) for dataset in datasets}
        for kind in kinds
    }
    found["trl"] = {dataset: figures(folder, "trl", kinds[0], dataset) for dataset in datasets}
    found["host_ratio_to_trl"] = host_ratio(folder, kinds[0])
    return found


def figures(folder: Path, tool: str, kind: str, dataset: str) -> Figures:
    """Figures of one step: those of a layer are the difference of two models."""
    fewer, more = (
        _run(folder, tool, kind, dataset, layers, COUNTED_STEPS) for layers in (FEWER, MORE)
    )
    a_layer = more["launches"] - fewer["launches"]
    return {
        "launches_per_layer": a_layer,
        "launches_34_layers": fewer["launches"] + (NUM_LAYERS - FEWER) * a_layer,
        "autograd_nodes_per_layer": more["autograd_nodes"] - fewer["autograd_nodes"],
        **{name: more[name] for name in ("list_tensors", "syncs", "index_put_backward")},
        BY_NAME: {
            name: count - fewer["operators"].get(name, 0)
            for name, count in more["operators"].items()
            if count > fewer["operators"].get(name, 0)
        },
    }


def host_ratio(folder: Path, kind: str) -> float:
    """Seconds of the host for one layer of one step, beside TRL's.

    The runs take turns, and of each the quickest counts: the one that other work disturbed least.
    """
    runs = list(itertools.product(("halfbyte", "trl"), (FEWER_TIMED, MORE_TIMED)))
    seconds = dict.fromkeys(runs, math.inf)
    for _ in range(TIMED_RUNS):
        for tool, layers in runs:
            found = _run(folder, tool, kind, SHORT, layers, TIMED_STEPS)["host_s"]
            seconds[tool, layers] = min(seconds[tool, layers], found)
    ours, trls = (
        seconds[tool, MORE_TIMED] - seconds[tool, FEWER_TIMED] for tool in ("halfbyte", "trl")
    )
    return ours / trls


def _run(folder: Path, tool: str, kind: str, dataset: str, num_layers: int, steps: int) -> Figures:
    """Train a tiny model with a tool in a process of its own; return what it counted.

    Raises:
        SystemExit: the process failed.
    """
    sizes = NARROWEST if dataset == SHORT else SIZES
    out = folder / f"{tool}-{kind}-{dataset}-{num_layers}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_tiny_rows(dataset, steps, 0, out / "rows.json")
    job = {
        "model": str(tiny_model(kind, num_layers, folder / "models", sizes)),
        "rows": str(out / "rows.json"),
        "out": str(out),
        "device": "cpu",
        "dtype": "bf16",
        "steps": steps,
        "step_rows": STEP_ROWS,
        "micro_batch": STEP_ROWS,
        "checkpointing": False,
        "tuned": True,
        "liger": False,
        "rank": 16,
        "alpha": 16,
        "learning_rate": 2e-4,
        "seed": 0,
        "spawned_at": time.time(),
    }
    (out / "job.json").write_text(json.dumps(job))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HALFBYTE_CAPABILITY": CAPABILITY,
    }
    share = str(TINY_VOCABULARY / REAL_VOCABULARY[kind])
    command = [sys.executable, "-m", "benchmarks.peers.counted", str(out / "job.json"), tool, share]
    with (out / "log").open("w") as log:
        if subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode:
            raise SystemExit(f"{tool} failed:\n{(out / 'log').read_text()[-3000:]}")
    counts: Figures = json.loads((out / "counts.json").read_text())
    return counts


def as_table(found: Figures) -> str:
    """The figures as a table in Markdown."""
    names = [name for name in found if isinstance(found[name], dict)]
    first = next(iter(found[names[0]].values()))
    columns = [column for column in first if column != BY_NAME]
    lines = [f"| | rows | {' | '.join(column.replace('_', ' ') for column in columns)} |"]
    lines.append("|" + " --- |" * (len(columns) + 2))
    for name in names:
        for dataset, figures in found[name].items():
            cells = " | ".join(f"{figures[column]:,}" for column in columns)
            lines.append(f"| {name} | {dataset} | {cells} |")
    lines += ["", f"Seconds of the host beside TRL's: {found['host_ratio_to_trl']:.2f}", ""]
    lines += [f"What a layer of {names[0]} launches in a step:", "", "| operator | launches |"]
    lines += ["| --- | --- |", *(f"| {name} | {count} |" for name, count in first[BY_NAME].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
