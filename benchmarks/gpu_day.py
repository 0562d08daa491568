"""Everything that a GPU alone can show, in one call of twenty minutes.

python -m benchmarks.gpu_day [--out benchmarks/results/gpu_CARD] [--parts …] [--minutes 20] [--tiny]

Kernels beside their formulas; attention beside softmax in fp32; the speed benchmark against the tools that are
installed here; the plan beside what was allocated; operators of a step; the path of a T4 on this card. Each part is
a process of its own, so that one that fails costs its own figures alone, and the report is written after each.
--tiny runs all of it on a CPU, with two layers and our operators' twins, to show that it runs. Not tried on a
GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.harness.models import ROOT
from halfbyte.kernels import varlen
from halfbyte.kernels.capability import capability_of
from halfbyte.kernels.library import OPERATORS
from halfbyte.kernels.operators import triton_refusal

TINY_CAPABILITY = "9.0"
REPEATS = 20
HEADS = {"gemma4b": (8, 4, 256, 1024), "llama8b": (32, 8, 128, 0)}  # H, G, D, window
SPANS = {"chat": (0, [30, 55, 80, 81, 120, 160, 300, 500]), "prompt460": (460, [39] * 16)}
DATASETS = ("chat", "equal", "prompt460")
Figures = dict[str, Any]


# --- parts, each in its own process ---


def machine(device: torch.device) -> Figures:
    """Card, versions, and why Triton does not work here, if so."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    refusal = triton_refusal() if device.type == "cuda" else ""
    return {"name": name, "capability": capability_of(device), "torch": torch.__version__} | {
        "triton_refusal": refusal
    }


def kernel_times(device: torch.device) -> Figures:
    """Distance of each kernel from its formula, and the time that both take."""
    found: Figures = {}
    dtype = torch.bfloat16 if (capability_of(device) or (0, 0)) >= (8, 0) else torch.float16
    for name, formula, given in kernels.cases(dtype):
        moved = [one.to(device) if isinstance(one, torch.Tensor) else one for one in given]
        exact = [kernels.as_fp32(one) for one in moved]
        wanted = formula(*exact)
        call = getattr(torch.ops.halfbyte, name)
        result = call(*moved)
        results = (result, moved[3]) if name == "softmax_block" else kernels.as_tuple(result)
        gap = max(map(kernels.distance, results, kernels.as_tuple(wanted)))
        row = found.setdefault(name, {"distance": 0.0, "kernel_ms": 0.0, "formula_ms": 0.0})
        row["distance"] = max(row["distance"], gap)
        row["kernel_ms"] += _milliseconds(device, lambda: call(*moved))  # noqa: B023
        row["formula_ms"] += _milliseconds(device, lambda: OPERATORS[name].twin(*moved))  # noqa: B023
    return found


def attention(device: torch.device) -> Figures:
    """Distance from the formula in fp32, and the time of one call forward and backward."""
    found: Figures = {}
    for model, (heads, groups, size, window) in HEADS.items():
        for rows, (stem, lengths) in SPANS.items():
            shrink = 1 if device.type == "cuda" else 8
            spans = [-(-n // shrink) for n in ([stem] if stem else []) + lengths]
            keys = [spans[0], *(spans[0] + n for n in spans[1:])] if stem else spans
            found[f"{model} {rows}"] = _attention(
                device, (heads, groups, size), window, spans, keys
            )
    return found


def _attention(
    device: torch.device,
    shape: tuple[int, int, int],
    window: int,
    queries: list[int],
    keys: list[int],
) -> Figures:
    heads, groups, size = shape
    dtype = torch.bfloat16 if (capability_of(device) or (0, 0)) >= (8, 0) else torch.float16
    torch.manual_seed(0)
    q, dy = (torch.randn(sum(queries), heads, size, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(sum(keys), groups, size, device=device, dtype=dtype) for _ in range(2))
    starts = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device=device)
        for n in (queries, keys)
    ]
    given: Any = (*starts, [max(queries), max(keys)], window, size**-0.5)
    exact: Any = [one.float() for one in (q, k, v, dy)]
    output, *rest = varlen.varlen(*exact[:3], *given)
    formula: Any = varlen.varlen_backward
    wanted = (output, *formula(exact[3], *exact[:3], [output, *rest], *given))

    def both() -> tuple[torch.Tensor, ...]:
        out, *kept = torch.ops.halfbyte.varlen(q, k, v, *given)
        return out, *torch.ops.halfbyte.varlen_backward(dy, q, k, v, [out, *kept], *given)

    gaps = [kernels.distance(a, b) for a, b in zip(both(), wanted, strict=True)]
    names = ("output", "dq", "dk", "dv")
    flash = varlen.uses_flash(capability_of(device), dtype, size)
    return dict(zip(names, gaps, strict=True)) | {
        "ms": _milliseconds(device, lambda: both()),
        "kernel": "flash" if flash else "memory-efficient",
    }


def _milliseconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Median time of a call, after three others."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    times = []
    for _ in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return float(statistics.median(times[3:]))


PARTS = {"machine": machine, "kernels": kernel_times, "attention": attention}


# --- parts that are programs of their own ---


def programs(tiny: bool, folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of each, by name; each leaves its report in the folder."""
    python = [sys.executable, "-m"]
    speed = [*python, "benchmarks.speed", "--here", "--steps", "4" if tiny else "10"]
    speed += ["--tiny", "--reps", "1"] if tiny else ["--device", "cuda", "--reps", "3"]
    installed = ["halfbyte"] if tiny else ["halfbyte", "trl-tuned", "unsloth-tuned"]
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    for dataset in ("chat",) if tiny else DATASETS:
        out = str(folder / f"speed_{dataset}")
        command = [*speed, "--datasets", dataset, "--tools", *installed, "--out", out]
        found[f"speed {dataset}"] = (command, {})
    out = str(folder / "speed_t4")
    found["speed as on a T4"] = (
        [*speed, "--datasets", "chat", "--tools", "halfbyte", "--out", out],
        {"HALFBYTE_CAPABILITY": "7.5"},
    )
    out = str(folder / "step_ops.md")
    few = ["--kinds", "gemma", "--datasets", "chat"] if tiny else []
    found["step_ops"] = ([*python, "benchmarks.step_ops", *few, "--out", out], {})
    return found


def main() -> None:
    """All parts, one after the other, within the time."""
    arguments = _arguments()
    if arguments.part:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(PARTS[arguments.part](device)))
        return
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --tiny runs all parts on the CPU")
    began, folder = time.time(), ROOT / ".bench" / "gpu_day"
    folder.mkdir(parents=True, exist_ok=True)
    report: Figures = {"command": " ".join(["python -m benchmarks.gpu_day", *sys.argv[1:]])}
    own: dict[str, tuple[list[str], dict[str, str]]] = {
        name: ([sys.executable, "-m", "benchmarks.gpu_day", "--part", name], {}) for name in PARTS
    }
    for name, (command, more) in (own | programs(arguments.tiny, folder)).items():
        if arguments.parts and name not in arguments.parts:
            continue
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
    path = Path(command[command.index("--out") + 1]).with_suffix(".json")
    return {**figures, **json.loads(path.read_text())}


def _write(report: Figures, path: Path) -> None:
    """Write the report as JSON, and what fits into tables as Markdown."""
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"`{report['command']}`", ""]
    for name, figures in report.items():
        if name == "command":
            continue
        lines += [f"## {name}", ""]
        rows = (
            {k: v for k, v in figures.items() if isinstance(v, dict)}
            if isinstance(figures, dict)
            else {}
        )
        flat = figures if not rows else {}
        lines += (
            [f"- {key}: {value}" for key, value in flat.items()]
            if isinstance(flat, dict)
            else [flat]
        )
        for key, row in rows.items():
            lines.append(f"- {key}: " + ", ".join(f"{a} {b}" for a, b in row.items()))
        lines.append("")
    path.with_suffix(".md").write_text("\n".join(lines))


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
