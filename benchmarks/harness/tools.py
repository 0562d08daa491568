"""Owns the tools that are compared, and the environment that each of them gets."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.models import ROOT

REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements"
# SFTConfig's, transformers' and so LLaMA-Factory's default of rows in one forward pass.
DEFAULT_MICRO_BATCH = 8


@dataclass(frozen=True)
class Tool:
    """A way to train.

    Attributes:
        driver: module in ``benchmarks.peers``.
        environment: requirements by device; none for the environment of the benchmark itself.
        tuned: with what an expert would set.
        micro_batches: rows of one forward pass, of which the fastest is taken; none: the tool plans.
        liger: with Liger's kernels.
    """

    driver: str
    environment: dict[str, str]
    tuned: bool = False
    micro_batches: tuple[int, ...] = (DEFAULT_MICRO_BATCH,)
    liger: bool = False


TRL = {"cpu": "trl", "cuda": "trl"}
UNSLOTH = {"cpu": "unsloth", "cuda": "unsloth-cuda"}
LLAMAFACTORY = {"cpu": "llamafactory"}
SWEEP = (16, 8, 4, 2, 1)
TOOLS = {
    "trl": Tool("trl", TRL),
    "trl-tuned": Tool("trl", TRL, tuned=True, micro_batches=SWEEP),
    "liger": Tool("trl", {"cuda": "liger"}, liger=True),
    "unsloth": Tool("unsloth", UNSLOTH),
    "unsloth-tuned": Tool("unsloth", UNSLOTH, tuned=True, micro_batches=SWEEP),
    "llamafactory": Tool("llamafactory", LLAMAFACTORY),
    "llamafactory-tuned": Tool("llamafactory", LLAMAFACTORY, tuned=True, micro_batches=SWEEP),
    "halfbyte": Tool("halfbyte", {}, micro_batches=()),
}


def tools_on(device: str) -> list[str]:
    """Names of the tools that run on a device."""
    return [
        name for name, tool in TOOLS.items() if not tool.environment or device in tool.environment
    ]


def python_of(tool: Tool, device: str, folder: Path) -> str:
    """The Python of the tool's environment, which is made if it is not there as required."""
    if not tool.environment:
        return sys.executable
    name = tool.environment[device]
    files = [REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}.no-deps.txt"]
    wanted = "".join(file.read_text() for file in files if file.exists())
    environment = folder / device / name
    python, ready = str(environment / "bin" / "python"), environment / "ready"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if ready.exists() and ready.read_text() == digest:
        return python
    print(f"making the environment of {name}", flush=True)
    _call(sys.executable, "-m", "venv", "--clear", str(environment))
    _call(python, "-m", "pip", "install", "--quiet", "-r", str(files[0]))
    if files[1].exists():
        _call(python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(files[1]))
    ready.write_text(digest)
    return python


def _call(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
