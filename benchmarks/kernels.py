"""Our kernels in Triton without a GPU: distance from their formulas, and registers on five targets.

python -m benchmarks.kernels [--json] [--out FILE.md]

Numbers are those of Triton's interpreter beside the same formula in fp32; each kernel is compiled by the
assembler that comes with Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.models import ROOT
from halfbyte.kernels import gates, norms, operators, products, softmax, unpack
from halfbyte.kernels.library import OPERATORS

CAPABILITIES = (75, 80, 89, 90, 120)
FIRST_BF16 = 80
INTERPRET = "--interpret"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest distance from fp32 as a share of the largest number. The interpreter rounds to bf16 toward zero, which is
# twice as far off as a GPU.
BOUNDS = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1.6e-2}
Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


# --- numbers ---


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield the name of each operator with its formula and arguments, over shapes that fill no block."""
    torch.manual_seed(0)

    def draw(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(to)

    for size in (64, 640, 2560):
        x, dy, weight = draw(3, size), draw(3, size), draw(size, to=torch.float32)
        yield "rms_norm", norms.rms_norm, (x, weight, 1e-6, None)
        yield "rms_norm", norms.rms_norm, (x, weight, 1e-6, dy)
        yield "rms_norm_backward", norms.rms_norm_backward, (dy, x, weight, 1e-6)
    for activation in ("silu", "gelu_tanh"):
        gate, up, dy = draw(3, 700), draw(3, 700), draw(3, 700)
        yield "glu", gates.glu, (gate, up, activation)
        yield "glu_backward", gates.glu_backward, (dy, gate, up, activation)
    for size in (16, 80, 256):
        q, k, dq, dk = draw(5, 4, size), draw(5, 2, size), draw(5, 4, size), draw(5, 2, size)
        tables = draw(5, size), draw(5, size)
        weights = draw(size, to=torch.float32), draw(size, to=torch.float32)
        for both in (weights, (None, None)):
            yield "norm_rope", operators.norm_rope, (q, k, *tables, *both, 1e-6)
            yield (
                "norm_rope_backward",
                operators.norm_rope_backward,
                (dq, dk, q, k, *tables, *both, 1e-6),
            )
    for shape in ([3, 50], [64, 128]):
        num_weights = shape[0] * shape[1]
        blocks = -(-num_weights // 64)
        codes = torch.randint(256, (-(-num_weights // 2), 1), dtype=torch.uint8)
        table, nested = torch.randn(16), torch.randn(256)
        large = torch.rand(-(-blocks // 256))
        nested_maxima = torch.randint(256, (blocks,), dtype=torch.uint8)
        double = (nested, large, torch.tensor(0.5))
        yield (
            "unpack_4bit",
            unpack.unpack_4bit,
            (codes, nested_maxima, table, *double, 64, shape, dtype),
        )
        plain = (None, None, None)
        yield (
            "unpack_4bit",
            unpack.unpack_4bit,
            (codes, torch.rand(blocks), table, *plain, 64, shape, dtype),
        )
    labels = torch.tensor([3, 150, 4000], dtype=torch.int32)
    for softcap in (0.0, 5.0):
        running = torch.zeros(4, 3)
        running[0], running[1] = 1.0, 2.0
        logits = draw(3, 130, to=torch.float32) * 4
        yield "softmax_block", _softmax, (logits, labels, 100, running, softcap, dtype)
    copies = draw(7, 600)
    starts = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    places = torch.tensor([6, 0, 2, 1, 3, 4, 5], dtype=torch.int32)
    yield "sum_copies", products.sum_copies, (copies, starts, places)


def _softmax(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p and what runs along, which the operator changes in place."""
    return softmax.softmax_block(*given), given[3]


def distances() -> dict[str, dict[str, float]]:
    """Largest distance of each kernel by dtype; only in a process with Triton's interpreter."""
    found: dict[str, dict[str, float]] = {}
    for dtype_name, dtype in DTYPES.items():
        for name, formula, given in cases(dtype):
            wanted = formula(*(as_fp32(one) for one in given))
            result = OPERATORS[name].launch(*given)
            if name == "softmax_block":
                result = result, given[3]
            gap = max(map(distance, as_tuple(result), as_tuple(wanted)))
            row = found.setdefault(name, {})
            row[dtype_name] = max(row.get(dtype_name, 0.0), gap)
    return found


def as_fp32(one: Any) -> Any:
    """An argument in fp32, and as a copy, since an operator may change it."""
    if isinstance(one, torch.Tensor):
        return one.float().clone() if one.is_floating_point() else one.clone()
    return torch.float32 if isinstance(one, torch.dtype) else one


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    """Results of an operator, also of one with a single result."""
    return result if isinstance(result, tuple) else (result,)


def distance(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest wanted number."""
    largest = wanted.abs().max().clamp(min=1e-30)
    return float((result.double() - wanted.double()).abs().max() / largest)


# --- targets ---


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Attributes:
        registers: of a thread.
        shared_bytes: of a program.
        spilled_bytes: of a thread, which lie in slow memory.
    """

    kernel: str
    dtype: str
    capability: int
    registers: int
    shared_bytes: int
    spilled_bytes: int


F32, U8, I32, FLOAT, INT = "*fp32", "*u8", "*i32", "fp32", "i32"


def signatures(kind: str) -> dict[str, tuple[dict[str, str], dict[str, Any], int]]:
    """Types of each kernel's arguments, its constants, and its groups of 32 threads, at Gemma-3-4b's sizes."""
    x = f"*{kind}"
    norm = {"size": INT, "eps": FLOAT}
    heads = dict.fromkeys(("q", "k", "cos", "sin"), x)
    heads |= {"q_weight": F32, "k_weight": F32}
    heads |= dict.fromkeys(("q_out", "k_out", "dq_in", "dk_in"), x)
    heads |= {"heads": INT, "groups": INT, "half": INT, "eps": FLOAT}
    glu = {"SILU": False, "BLOCK": 1024}
    packed = {"codes": U8, "maxima": U8, "table": F32, "nested_table": F32, "nested_maxima": F32}
    packed |= {"offset": F32, "weights": x, "num_blocks": INT, "num_weights": INT}
    unpack_constants = {"NESTED": True, "HALF": 32, "NESTED_BLOCK": 256, "ROWS": 16}
    blocks = {"logits": F32, "labels": I32, "first": INT, "running": F32, "p": x}
    blocks |= {"num_predictions": INT, "size": INT, "softcap": FLOAT}
    return {
        "_rms_norm": (
            {"x": x, "weight": F32, "residual": x, "y": x, **norm},
            {"ADDS": True, "BLOCK": 4096},
            8,
        ),
        "_rms_norm_backward": (
            {"dy": x, "x": x, "weight": F32, "dx": x, **norm},
            {"BLOCK": 4096},
            8,
        ),
        "_glu": ({"gate": x, "up": x, "y": x, "size": INT}, glu, 4),
        "_glu_backward": (
            dict.fromkeys(("dy", "gate", "up", "dgate", "dup"), x) | {"size": INT},
            glu,
            4,
        ),
        "_norm_rope": (heads, {"NORMS": True, "BACKWARD": True, "BLOCK": 128}, 1),
        "_unpack_4bit": (packed, unpack_constants, 4),
        "_softmax_block": (blocks, {"CAPPED": False, "BLOCK": 4096, "NUM_BLOCKS": 14}, 8),
        "_sum_copies": (
            {"copies": x, "starts": I32, "places": I32, "total": x, "size": INT},
            {"BLOCK": 512},
            4,
        ),
    }


def compiled() -> list[Compiled]:
    """Compile each kernel for each target.

    Raises:
        RuntimeError: Triton cannot compile one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from halfbyte.kernels import triton_blocks, triton_layers

    found = []
    for kind in ("fp16", "bf16"):
        for name, (types, constants, num_warps) in signatures(kind).items():
            kernel = getattr(triton_layers, name, None) or getattr(triton_blocks, name)
            signature = types | dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            for capability in CAPABILITIES:
                if kind == "bf16" and capability < FIRST_BF16:
                    continue
                made = triton.compile(
                    source,
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": num_warps},
                )
                registers, spilled = _resources(made.asm["cubin"])
                shared = int(made.metadata.shared)
                found.append(Compiled(name[1:], kind, capability, registers, shared, spilled))
    return found


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as the tool that comes with Triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


# --- report ---


def interpreted() -> dict[str, dict[str, float]]:
    """Distances, from a process with Triton's interpreter."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
    }
    command = [sys.executable, "-m", "benchmarks.kernels", INTERPRET]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, float]] = json.loads(result.stdout)
    return found


def as_table(numbers: dict[str, dict[str, float]], made: list[Compiled]) -> str:
    """Both as tables in Markdown."""
    lines = ["| kernel | fp32 | fp16 | bf16 |", "| --- | --- | --- | --- |"]
    for name, gaps in numbers.items():
        lines.append(f"| {name} | {' | '.join(f'{gaps[dtype]:.1g}' for dtype in DTYPES)} |")
    lines.append(f"| bound | {' | '.join(f'{BOUNDS[dtype]:.1g}' for dtype in DTYPES)} |")
    head = " | ".join(f"sm{capability}" for capability in CAPABILITIES)
    lines += ["", f"| kernel | dtype | {head} |", "|" + " --- |" * (len(CAPABILITIES) + 2)]
    for kernel, dtype in dict.fromkeys((one.kernel, one.dtype) for one in made):
        cells = {
            one.capability: f"{one.registers}, {one.shared_bytes} B, {one.spilled_bytes} B"
            for one in made
            if (one.kernel, one.dtype) == (kernel, dtype)
        }
        row = " | ".join(cells.get(capability, "") for capability in CAPABILITIES)
        lines.append(f"| {kernel} | {dtype} | {row} |")
    return "\n".join(
        [*lines, "", "Registers of a thread, shared memory, spilled bytes of a thread."]
    )


def main() -> None:
    """Both tables, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the tables")
    parser.add_argument(INTERPRET, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.interpret:
        print(json.dumps(distances()))
        return
    numbers, made = interpreted(), compiled()
    table = as_table(numbers, made)
    found = {"distances": numbers, "compiled": [vars(one) for one in made]}
    print(json.dumps(found) if arguments.json else table)
    if arguments.out:
        arguments.out.write_text(f"`python -m benchmarks.kernels`\n\n{table}\n")


if __name__ == "__main__":
    main()
