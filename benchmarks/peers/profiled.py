"""Owns the run with halfbyte under PyTorch's profiler: where the seconds of its last step go."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerState

from benchmarks.peers.halfbyte import main
from benchmarks.peers.job import Job, read_job

# By the beginning of an operator's name; what is left of PyTorch's own works element by element.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention kernels": ("aten::_scaled_dot_product",),
    "unpacking weights": ("bitsandbytes::",),
    "other operators": ("aten::",),
}
REST = "Python and autograd"


class StepProfile(TrainerCallback):
    """Profiles the last step and writes ``profile.json``: seconds by kind, and of the step."""

    def __init__(self, job: Job) -> None:
        """For a job of ``job.steps`` steps."""
        self.job = job
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.began_at = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Begin with the last one."""
        if state.global_step == self.job.steps - 1:
            self.profiler.start()
            self.began_at = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Sum up what each operator took without those that it calls."""
        if state.global_step != self.job.steps:
            return
        step_s = time.perf_counter() - self.began_at
        self.profiler.stop()
        seconds = dict.fromkeys((*KINDS, REST), 0.0)
        for event in self.profiler.key_averages():
            kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), REST)
            seconds[kind] += event.self_cpu_time_total / 1e6
        found = {"step_s": step_s, "seconds": seconds}
        (Path(self.job.out) / "profile.json").write_text(json.dumps(found))


if __name__ == "__main__":
    given = read_job()
    main(given, StepProfile(given))
