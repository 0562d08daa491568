"""Where the time of a step of halfbyte goes, by kind of operator, on the rows of the speed benchmark.

python -m benchmarks.step_time [--models …] [--datasets …] [--steps 4] [--out FILE.md]

The last step runs under PyTorch's profiler, which makes it a little slower. On the CPU in fp32, on CUDA
(--device cuda) in bf16; --out FILE.md also writes FILE.json, with the kernels that take longest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.launch import Bench
from benchmarks.harness.models import MODELS, ROOT
from benchmarks.harness.rows import DATASETS

DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def main() -> None:
    """One profiled run for each model and dataset → a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "gemma270m"])
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DTYPE, default="cpu")
    parser.add_argument("--out", type=Path, help="write the table, and all figures beside it")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    device = arguments.device
    bench = Bench(
        ROOT / ".bench",
        device,
        arguments.steps,
        arguments.seed,
        False,
        threads,
        here=True,
        dtype=DTYPE[device],
    )
    lines: list[str] = []
    profiles: dict[str, Any] = {}
    for model in arguments.models:
        for dataset in arguments.datasets:
            folder, path, _ = bench.lay(model, dataset)
            profiles[f"{model} {dataset}"] = found = bench.profile(folder, path)
            total = sum(found["seconds"].values())
            if not lines:
                head = ["model", "rows", "step, s", *found["seconds"]]
                lines = [_row(head), "|" + " --- |" * len(head)]
                print("\n".join(lines))
            shares = [f"{seconds / total:.0%}" for seconds in found["seconds"].values()]
            lines.append(_row([model, dataset, f"{found['step_s']:.2f}", *shares]))
            print(lines[-1], flush=True)
    if arguments.out:
        command = " ".join(["python -m benchmarks.step_time", *sys.argv[1:]])
        arguments.out.write_text("\n".join([f"`{command}`", "", *lines, ""]))
        arguments.out.with_suffix(".json").write_text(json.dumps(profiles, indent=1) + "\n")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
