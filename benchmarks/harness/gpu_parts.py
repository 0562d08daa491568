"""Owns the parts of a day with a GPU that are measured in a process of their own, and return their figures."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.harness.models import ROOT, model_folder
from halfbyte.kernels import operators, varlen
from halfbyte.kernels.capability import capability_of
from halfbyte.kernels.library import OPERATORS
from halfbyte.kernels.operators import triton_refusal

REPEATS = 20
HEADS = {"gemma4b": (8, 4, 256, 1024), "llama8b": (32, 8, 128, 0)}  # H, G, D, window
SPANS = {"chat": (0, [30, 55, 80, 81, 120, 160, 300, 500]), "prompt460": (460, [39] * 16)}
# As many large steps as change the model by more than rounding, which a server checks.
TRAIN = {"learning_rate": 5e-3, "max_steps": 8, "save_steps": 0, "num_samples": 0}
FOLDER = ROOT / ".bench" / "gpu_day"
Figures = dict[str, Any]


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


def products(device: torch.device) -> Figures:
    """Distance of products that stay in fp32 from those of fp32 matrices, and their time beside rounded ones."""
    found: Figures = {}
    dtype = torch.bfloat16 if (capability_of(device) or (0, 0)) >= (8, 0) else torch.float16
    side = 2560 if device.type == "cuda" else 128
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((side, side), (side, 16)))
    exact = a.double() @ b.double()
    total = torch.ones_like(exact, dtype=torch.float32)
    operators.addmm_fp32_(total, a, b)
    for name, result, wanted in (
        ("mm_fp32", operators.mm_fp32(a, b, 0.5), exact * 0.5),
        ("addmm_fp32_", total, exact + 1),
    ):
        found[name] = {"distance": kernels.distance(result, wanted)}
    found["mm_fp32"]["kernel_ms"] = _milliseconds(device, lambda: operators.mm_fp32(a, b, 0.5))
    found["addmm_fp32_"]["kernel_ms"] = _milliseconds(
        device, lambda: operators.addmm_fp32_(total, a, b)
    )
    found["mm_fp32"]["formula_ms"] = _milliseconds(device, lambda: a @ b)
    return found


def serving(device: torch.device) -> Figures:
    """Tokens a second of a drawn model with an adapter of a few steps, alone and 16 at once."""
    is_cuda = device.type == "cuda"
    folder = FOLDER / "serving"
    model = model_folder("gemma4b-random" if is_cuda else "gemma4b-narrow", FOLDER / "models")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = random.Random(0)
    rows = (
        [" ".join(str(source.randrange(10, 4000)) for _ in range(n)) for n in (20, 6)]
        for _ in range(64)
    )
    with (folder / "rows.jsonl").open("w") as file:
        for prompt, answer in rows:
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    config = {
        "name": "drawn",
        "runs_dir": str(folder / "runs"),
        "model": {"name": str(model)},
        "data": {"train": str(folder / "rows.jsonl")},
        "train": TRAIN,
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    out = folder / "serve"
    ours = ("halfbyte", "halfbyte, half of them to the adapter")
    serve, run = "benchmarks/serve_throughput.py", str(folder / "runs" / "drawn")
    for command in (
        ["train/sft.py", str(folder / "run.yaml")],
        [serve, run, "--device", device.type, "--out", str(out), "--only", *ours],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)
    results: Figures = json.loads(out.with_suffix(".json").read_text())["results"]
    return results


PARTS = {
    "machine": machine,
    "kernels": kernel_times,
    "products": products,
    "attention": attention,
    "serving": serving,
}
