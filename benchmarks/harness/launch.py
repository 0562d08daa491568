"""Owns one run of one tool: a process of its own, its log, its result; and the common evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.models import MODELS, ROOT, model_folder
from benchmarks.harness.rows import STEP_ROWS, Rows, make_rows
from benchmarks.harness.tools import TOOLS, Tool, python_of

RANK, ALPHA, LEARNING_RATE = 16, 16, 2e-4
Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all runs of a benchmark share.

    Attributes:
        folder: for environments, drawn models and runs.
        checkpointing: on for every tool; else tuned tools have it off and the others their default.
        threads: of each process on the CPU.
        here: every tool runs in the environment of the benchmark itself.
        dtype: what matrix products compute in.
    """

    folder: Path
    device: str
    steps: int
    seed: int
    checkpointing: bool
    threads: int
    here: bool = False
    dtype: str = "fp32"

    def python_of(self, tool: Tool) -> str:
        """The Python that runs a tool; its environment is made if it is not there as required."""
        return sys.executable if self.here else python_of(tool, self.device, self.folder)

    def lay(self, model: str, dataset: str, chat: Path | None = None) -> tuple[Path, Path, Rows]:
        """Folder of the model, file of the rows and the rows, made for runs to come."""
        folder = model_folder(model, self.folder / "models")
        rows = make_rows(dataset, MODELS[model], folder, self.steps, self.seed, chat)
        path = self.folder / "runs" / self.device / f"{model}-{dataset}" / "rows.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.write(path)
        return folder, path, rows

    def run(
        self, name: str, model: Path, rows: Path, micro_batch: int | None, steps: int
    ) -> Result:
        """Train with a tool; a process that dies leaves ``failed``, which the report shows."""
        tool = TOOLS[name]
        out = _empty(rows.parent / name)
        job = self._job(tool, model, rows, out, micro_batch, steps)
        result: Result = {"tool": name, "load": os.getloadavg()[0]}
        code = self._spawn(tool, tool.driver, job, out)
        if code:
            print(f"{name} ended with {code}; the end of its log:", file=sys.stderr)
            print((out / "log").read_text(errors="replace")[-1500:], file=sys.stderr, flush=True)
            return result | {"failed": f"exit {code}", "micro_batch": micro_batch}
        left: Result = json.loads((out / "result.json").read_text())
        return result | left

    def held_out(self, names: list[str], model: Path, rows: Path) -> dict[str, float]:
        """Held-out loss of the adapters that the latest runs of these tools have left."""
        out = _empty(rows.parent / "evaluation")
        adapters = {name: str(rows.parent / name / "adapter") for name in names}
        (out / "adapters.json").write_text(json.dumps(adapters))
        losses: dict[str, float] = self._of_ours("evaluate", model, rows, out, 0, "losses.json")
        return losses

    def profile(self, model: Path, rows: Path) -> Result:
        """Seconds of halfbyte's last step by kind of operator."""
        out = _empty(rows.parent / "profile")
        found: Result = self._of_ours("profiled", model, rows, out, self.steps, "profile.json")
        return found

    def _of_ours(
        self, module: str, model: Path, rows: Path, out: Path, steps: int, result: str
    ) -> Any:
        """What a module leaves in the file ``result``, run in halfbyte's environment."""
        ours = TOOLS["halfbyte"]
        job = self._job(ours, model, rows, out, None, steps)
        if self._spawn(ours, module, job, out):
            raise SystemExit(f"{module} failed:\n{(out / 'log').read_text()[-3000:]}")
        return json.loads((out / result).read_text())

    def gemm_flops(self) -> float:
        """Measured peak of a matrix product, in FLOP/s."""
        command = [sys.executable, "-m", "benchmarks.peers.gemm", self.device, self.dtype]
        environment = self._environment()
        return float(
            subprocess.run(command, env=environment, check=True, capture_output=True).stdout
        )

    def _job(
        self, tool: Tool, model: Path, rows: Path, out: Path, micro_batch: int | None, steps: int
    ) -> dict[str, Any]:
        return {
            "model": str(model),
            "rows": str(rows),
            "out": str(out),
            "device": self.device,
            "dtype": self.dtype,
            "steps": steps,
            "step_rows": STEP_ROWS,
            "micro_batch": micro_batch,
            "checkpointing": True if self.checkpointing else False if tool.tuned else None,
            "tuned": tool.tuned,
            "liger": tool.liger,
            "rank": RANK,
            "alpha": ALPHA,
            "learning_rate": LEARNING_RATE,
            "seed": self.seed,
        }

    def _spawn(self, tool: Tool, module: str, job: dict[str, Any], out: Path) -> int:
        python = self.python_of(tool)
        path = out / "job.json"
        path.write_text(json.dumps(job | {"spawned_at": time.time()}))
        command = [python, "-m", f"benchmarks.peers.{module}", str(path)]
        with (out / "log").open("w") as log:
            return subprocess.run(
                command, cwd=out, env=self._environment(), stdout=log, stderr=log, check=False
            ).returncode

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "src")]
        if self.here:
            paths += filter(None, [os.environ.get("PYTHONPATH")])
        told = {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device == "cpu":
            told["CUDA_VISIBLE_DEVICES"] = ""
        return os.environ | told


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
