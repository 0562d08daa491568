"""Measure halfbyte beside other tools: the same rows, the same steps, each tool in its own environment.

python -m benchmarks.speed [--models …] [--tools …] [--datasets …] [--out benchmarks/results/NAME]

Makes the environments under .bench/ on the first run, with pip, unless --here says that all tools are
installed beside halfbyte. Tools run one after the other and in turns (A B C A B C …), each run a process
of its own. Tuned tools take the fastest of 16, 8, 4, 2 and 1 rows a forward pass, found in runs of three
steps, fewer rows until they are no faster. There is no report unless losses of the first step agree.

On the CPU every tool computes in fp32 by default. For an environment without CUDA set
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where the package index has torch for CUDA.
With --device cuda the model is Gemma-3-4B with random weights, in bf16. Not tried: the tool liger, which
needs CUDA. Its model with two layers runs on the CPU: --tiny. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.launch import ALPHA, LEARNING_RATE, RANK, Bench
from benchmarks.harness.models import MODELS, ROOT
from benchmarks.harness.report import Cell, as_markdown, check_losses, write
from benchmarks.harness.rows import DATASETS, STEP_ROWS
from benchmarks.harness.tools import TOOLS, tools_on
from benchmarks.harness.work import work_of
from benchmarks.peers.job import DTYPES
from halfbyte.host import cpu_model

SWEEP_STEPS = 3
REFERENCES = ("trl-tuned", "trl")  # of the loss curve


def main() -> None:
    """Environments → each model with each dataset → a report."""
    arguments = _arguments()
    bench = Bench(
        ROOT / ".bench",
        arguments.device,
        arguments.steps,
        arguments.seed,
        arguments.checkpointing,
        len(os.sched_getaffinity(0)),
        arguments.here,
        arguments.dtype,
    )
    for name in arguments.tools:
        bench.python_of(TOOLS[name])
    if arguments.setup:
        return
    report = _begin(bench, arguments.reps)
    for model in arguments.models:
        for dataset in arguments.datasets:
            cell = _measure(bench, arguments, model, dataset)
            report["cells"].append(cell)
            for run in cell["runs"]:
                if "versions" in run:
                    report["versions"][run["tool"]] = run.pop("versions")
            if arguments.out:
                write(report, arguments.out)
    print(as_markdown(report))
    if any("failed" in run for cell in report["cells"] for run in cell["runs"]):
        raise SystemExit("some runs failed; the tables name them")


def _begin(bench: Bench, reps: int) -> dict[str, Any]:
    """A report without figures: what is run, on what, and how fast that multiplies."""
    return {
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "processor": _processor(bench.device),
        "settings": {
            "dtype": bench.dtype,
            "threads": bench.threads,
            "rank": RANK,
            "alpha": ALPHA,
            "learning_rate": LEARNING_RATE,
            "step_rows": STEP_ROWS,
            "num_steps": bench.steps,
            "reps": reps,
            "seed": bench.seed,
            "checkpointing": bench.checkpointing,
        },
        "gemm_flops": bench.gemm_flops(),
        "versions": {},
        "cells": [],
    }


def _measure(bench: Bench, arguments: argparse.Namespace, model: str, dataset: str) -> Cell:
    """All tools on one model and one dataset."""
    folder, path, rows = bench.lay(model, dataset, arguments.chat)
    tools: list[str] = arguments.tools
    cell: Cell = {
        "model": model,
        "dataset": dataset,
        "about": rows.about,
        "reference": next((name for name in REFERENCES if name in tools), tools[0]),
        "steps": work_of(folder, RANK).of_steps(rows.in_steps),
        "sweeps": [],
        "runs": [],
    }
    failed: set[str] = set()
    chosen = {name: _micro_batch(bench, arguments, name, folder, path, cell) for name in tools}
    for rep in range(1, arguments.reps + 1):
        for name in [name for name in tools if name not in failed]:
            run = bench.run(name, folder, path, chosen[name], bench.steps) | {"rep": rep}
            cell["runs"].append(run)
            failed |= {name} if "failed" in run else set()
            print(_said(cell, run), flush=True)
        check_losses(cell["runs"], bench.dtype)
    done = [name for name in tools if name not in failed]
    cell["held_out_losses"] = bench.held_out(done, folder, path)
    return cell


def _micro_batch(
    bench: Bench, arguments: argparse.Namespace, name: str, folder: Path, rows: Path, cell: Cell
) -> int | None:
    """Rows of a tool's forward pass: as given, its default, or the fastest of those that it can take."""
    candidates = TOOLS[name].micro_batches
    if name in arguments.micro_batch:
        return int(arguments.micro_batch[name])
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    seconds = {}
    for candidate in candidates:
        run = bench.run(name, folder, rows, candidate, SWEEP_STEPS)
        tried = {"tool": name, "micro_batch": candidate}
        if "failed" in run:
            cell["sweeps"].append(tried | {"failed": run["failed"]})
            continue
        seconds[candidate] = statistics.mean(run["step_s"][1:])
        cell["sweeps"].append(tried | {"seconds": seconds[candidate]})
        print(
            f"{cell['model']} {cell['dataset']}: {name} by {candidate} rows:"
            f" {seconds[candidate]:.2f} s a step",
            flush=True,
        )
        if seconds[candidate] > min(seconds.values()):
            break
    # If none has run, the repetition fails in the same way and the report says so.
    return min(seconds, key=lambda rows: seconds[rows]) if seconds else candidates[-1]


def _said(cell: Cell, run: dict[str, Any]) -> str:
    head = (
        f"{cell['model']} {cell['dataset']} {run['rep']}: {run['tool']:<18} load {run['load']:.2f}"
    )
    if "failed" in run:
        return f"{head}  failed: {run['failed']}"
    return (
        f"{head}  {statistics.median(run['step_s'][1:]):.2f} s a step, {run['peak_bytes'] / 1e9:.2f} GB,"
        f" loss {run['losses'][0]:.6f} to {run['losses'][-1]:.6f}"
    )


def _processor(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return cpu_model() or "CPU"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help="default: what the device suits"
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, help="default: all that run there")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on the CPU, bf16 on CUDA")
    parser.add_argument("--tiny", action="store_true", help="Gemma-3-4B with two layers, random")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute activations in every tool"
    )
    parser.add_argument("--chat", type=Path, metavar="FILE.jsonl", help="rows for the dataset chat")
    parser.add_argument(
        "--micro-batch", nargs="+", default=[], metavar="TOOL=ROWS", help="instead of trying"
    )
    parser.add_argument(
        "--here", action="store_true", help="all tools in this environment, which has them"
    )
    parser.add_argument("--setup", action="store_true", help="only make the environments")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.md")
    arguments = parser.parse_args()
    arguments.micro_batch = dict(text.split("=") for text in arguments.micro_batch)
    arguments.dtype = arguments.dtype or {"cpu": "fp32", "cuda": "bf16"}[arguments.device]
    real = ["smollm2", "gemma270m"]
    drawn = ["gemma4b-tiny" if arguments.tiny else "gemma4b-random"]
    random_weights = arguments.tiny or arguments.device == "cuda"
    arguments.models = arguments.models or (drawn if random_weights else real)
    arguments.datasets = arguments.datasets or list(DATASETS)
    able = tools_on(arguments.device)
    arguments.tools = arguments.tools or able
    unable = [name for name in arguments.tools if name not in able]
    if unable:
        parser.error(f"{', '.join(unable)}: not on {arguments.device}; there are {', '.join(able)}")
    if not set(arguments.micro_batch) <= set(TOOLS):
        parser.error(f"--micro-batch: tools are {', '.join(TOOLS)}")
    return arguments


if __name__ == "__main__":
    main()
