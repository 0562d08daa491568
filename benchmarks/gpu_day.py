"""Everything that a GPU alone can show, in one call of twenty minutes.

python -m benchmarks.gpu_day [--out benchmarks/results/gpu_CARD] [--parts …] [--minutes 20] [--tiny]

Kernels beside their formulas; attention beside softmax in fp32; served tokens; the speed benchmark against the
tools that are installed here, with the plan beside what was allocated; the path of a T4 on this card; a profile and
the operators of a step. Each part is a process of its own, so that one that fails costs its own figures alone, and
the report is written after each: with --parts several calls share the work. --tiny runs all of it on a CPU, with two
narrow layers and our operators' twins, to show that it runs. Not tried on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness.gpu_parts import FOLDER, PARTS, Figures
from benchmarks.harness.models import ROOT

TINY_CAPABILITY = "9.0"
DATASETS, TINY_DATASETS = ("chat", "equal", "icd10", "prompt460"), ("chat", "icd10")
TINY_SPEED = ("--steps", "3", "--reps", "1", "--micro-batch", "trl-tuned=16")
CUDA_SPEED = ("--steps", "10", "--reps", "3", "--device", "cuda")


def programs(tiny: bool) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of each, by name, the most telling first; each leaves its report in ``FOLDER``."""
    speed = ["benchmarks.speed", "--here", *(TINY_SPEED if tiny else CUDA_SPEED)]
    shapes = {"gemma4b": "gemma4b-random", "llama8b": "llama8b-random"}
    if tiny:
        shapes = {"gemma4b": "gemma4b-narrow", "llama8b": "llama8b-narrow"}
    tools = (
        ["halfbyte", "trl-tuned"] if tiny else ["halfbyte", "trl-tuned", "unsloth-tuned", "liger"]
    )
    as_t4 = [*speed, "--models", shapes["gemma4b"], "--datasets", "chat", "--tools", *tools[:2]]
    as_t4 += [] if tiny else ["--dtype", "fp16"]
    step_time = [
        "benchmarks.step_time",
        "--models",
        shapes["gemma4b"],
        "--datasets",
        "chat",
        "--device",
    ]
    step_time += ["cpu" if tiny else "cuda"]
    few = ["--kinds", "gemma", "--datasets", "chat"] if tiny else []
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    for shape, model in shapes.items():
        for dataset in TINY_DATASETS if tiny else DATASETS:
            command = [*speed, "--models", model, "--datasets", dataset, "--tools", *tools]
            found[f"speed {shape} {dataset}"] = (command, {})
        if shape == "gemma4b":
            found["speed as on a T4"] = (as_t4, {"HALFBYTE_CAPABILITY": "7.5"})
            found["step profile"] = (step_time, {})
    found["step operators"] = (["benchmarks.step_ops", *few], {})
    return {
        name: ([sys.executable, "-m", *command, "--out", str(_report_of(name))], more)
        for name, (command, more) in found.items()
    }


def _report_of(part: str) -> Path:
    return FOLDER / f"{part.replace(' ', '_')}.md"


def main() -> None:
    """All parts, one after the other, within the time."""
    arguments = _arguments()
    if arguments.part:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(PARTS[arguments.part](device)))
        return
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --tiny runs all parts on the CPU")
    began = time.time()
    FOLDER.mkdir(parents=True, exist_ok=True)
    report: Figures = {"command": " ".join(["python -m benchmarks.gpu_day", *sys.argv[1:]])}
    own: dict[str, tuple[list[str], dict[str, str]]] = {
        name: ([sys.executable, "-m", "benchmarks.gpu_day", "--part", name], {}) for name in PARTS
    }
    parts = own | programs(arguments.tiny)
    unknown = set(arguments.parts or parts) - set(parts)
    if unknown:
        raise SystemExit(f"no parts: {', '.join(unknown)}; there are {', '.join(parts)}")
    for name in arguments.parts or parts:
        command, more = parts[name]
        left = arguments.minutes * 60 - (time.time() - began)
        report[name] = _run(command, more, left, arguments.tiny) if left > 0 else "no time left"
        print(name, json.dumps(report[name])[:300], flush=True)
        if arguments.out:
            _write(report, arguments.out)
    if any(isinstance(one, dict) and "failed" in one for one in report.values()):
        raise SystemExit("some parts failed; the report names them")


def _run(command: list[str], more: dict[str, str], timeout_s: float, tiny: bool) -> Figures:
    """Run a part; return what it prints, or the report that it leaves."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    environment |= ({"HALFBYTE_CAPABILITY": TINY_CAPABILITY} if tiny else {}) | more
    began = time.time()
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time left", "seconds": time.time() - began}
    if result.returncode:
        return {"failed": (result.stderr or result.stdout)[-1500:], "seconds": time.time() - began}
    figures: Figures = {"seconds": time.time() - began}
    if "--part" in command:
        return {**figures, **json.loads(result.stdout.splitlines()[-1])}
    path = Path(command[-1]).with_suffix(".json")
    return {**figures, **json.loads(path.read_text())}


def _write(report: Figures, path: Path) -> None:
    """Write the report as JSON; as Markdown the reports of programs, and other figures in tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"`{report['command']}`", ""]
    for name, figures in report.items():
        if name == "command":
            continue
        lines += [f"## {name}", ""]
        if not isinstance(figures, dict):
            lines += [figures, ""]
        elif "failed" in figures:
            lines += ["failed:", "", "```", figures["failed"], "```", ""]
        elif _report_of(name).exists():
            lines += [_report_of(name).read_text().replace("\n## ", "\n### "), ""]
            lines += _plan_lines(figures)
        else:
            lines += [*_table(figures), ""]
    path.with_suffix(".md").write_text("\n".join(lines))


def _table(figures: Figures) -> list[str]:
    """Return a table of rows of figures, or a list of facts."""
    rows = {name: row for name, row in figures.items() if isinstance(row, dict)}
    lines = [f"- {name}: {value}" for name, value in figures.items() if name not in rows]
    if not rows:
        return lines
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines += ["", f"| | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for name, row in rows.items():
        cells = [f"{v:.3g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _plan_lines(figures: Figures) -> list[str]:
    """Return how far the plan was from what was allocated, where a part has trained with one."""
    lines = []
    for run in (run for cell in figures.get("cells", []) for run in cell["runs"]):
        probe = run.get("memory", {}).get("probe")
        if probe is not None:
            predicted, measured = (
                probe[f"{k}_bytes"]["peak"] / 1e9 for k in ("predicted", "measured")
            )
            lines.append(
                f"- plan: {predicted:.3f} GB, measured {measured:.3f} GB ({probe['error_frac']:+.2%})"
            )
    return [*lines, ""]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.md")
    parser.add_argument("--parts", nargs="+", help="names of parts; default: all")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to show that it runs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
