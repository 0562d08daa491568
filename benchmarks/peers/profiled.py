"""Owns the run with halfbyte under PyTorch's profiler: where the seconds of its last step go."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerState

from benchmarks.peers.halfbyte import main
from benchmarks.peers.job import Job, read_job

# By a part of the name of an operator on a CPU, of a kernel on CUDA.
ON_CPU = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention kernels": ("aten::_scaled_dot_product",),
    "unpacking weights": ("bitsandbytes::",),
    "other operators": ("aten::",),
}
ON_CUDA = {
    "matrix products": ("gemm", "nvjet", "cutlass", "splitK"),
    "attention kernels": ("flash", "fmha"),
    "unpacking weights": ("_unpack_4bit", "kDequantize"),
    "norms, rotation and gates": ("_rms_norm", "_norm_rope", "_glu"),
    "loss": ("_softmax_block",),
    "other operators": ("",),
}
REST = {"cpu": "Python and autograd", "cuda": "no kernel runs"}
NUM_KERNELS = 30


class StepProfile(TrainerCallback):
    """Profiles the last step and writes ``profile.json``: seconds by kind, and of the step."""

    def __init__(self, job: Job) -> None:
        """For a job of ``job.steps`` steps."""
        self.job = job
        more = [ProfilerActivity.CUDA] if job.device == "cuda" else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *more])
        self.began_at = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Begin with the last one."""
        if state.global_step == self.job.steps - 1:
            self._wait()
            self.profiler.start()
            self.began_at = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Sum up what each operator took without those that it calls."""
        if state.global_step != self.job.steps:
            return
        self._wait()
        step_s = time.perf_counter() - self.began_at
        self.profiler.stop()
        is_cuda = self.job.device == "cuda"
        kinds, rest = ON_CUDA if is_cuda else ON_CPU, REST[self.job.device]
        seconds = dict.fromkeys((*kinds, rest), 0.0)
        kernels = []
        for event in self.profiler.key_averages():
            if is_cuda and event.device_type != torch.profiler.DeviceType.CUDA:
                continue
            took_s = (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6
            kind = next(
                (k for k, names in kinds.items() if any(n in event.key for n in names)), rest
            )
            seconds[kind] += took_s
            kernels.append((took_s, event.count, event.key[:100]))
        if is_cuda:
            seconds[rest] = max(0.0, step_s - sum(seconds.values()))
        found = {"step_s": step_s, "seconds": seconds, "longest": sorted(kernels)[-NUM_KERNELS:]}
        (Path(self.job.out) / "profile.json").write_text(json.dumps(found))

    def _wait(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    given = read_job()
    main(given, StepProfile(given))
