"""Owns what every driver shares: the job it is given, the watch over its steps, the result it leaves.

Runs in each tool's own environment, so that it needs torch, transformers and datasets alone.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "unsloth",
    "unsloth_zoo",
    "llamafactory",
    "liger_kernel",
)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One run of one tool.

    Attributes:
        model: folder of the base model.
        rows: JSON file of the rows; see ``harness.rows``.
        out: folder for the adapter and the result.
        micro_batch: rows of one forward pass; None: as the tool decides.
        checkpointing: None: as the tool does by default.
        tuned: with what an expert would set.
        liger: with Liger's kernels.
        spawned_at: Unix time at which the process was started.
    """

    model: str
    rows: str
    out: str
    device: str
    dtype: str
    steps: int
    step_rows: int
    micro_batch: int | None
    checkpointing: bool | None
    tuned: bool
    liger: bool
    rank: int
    alpha: int
    learning_rate: float
    seed: int
    spawned_at: float

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the matrix products compute in."""
        return DTYPES[self.dtype]

    @property
    def adapter(self) -> str:
        """Folder in which a driver leaves the trained adapter."""
        return str(Path(self.out) / "adapter")

    def read_rows(self, order: str) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of the training rows, ``in_steps`` or as they were ``drawn``."""
        rows: list[tuple[list[int], list[int]]] = json.loads(Path(self.rows).read_text())[order]
        return rows


def read_job() -> Job:
    """The job whose JSON file is the only argument."""
    # Where memory runs out, this process is to go rather than another.
    Path("/proc/self/oom_score_adj").write_text("1000")
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def as_dataset(job: Job) -> Any:
    """The rows in step order as a dataset with ids and labels."""
    from datasets import Dataset

    rows = job.read_rows("in_steps")
    return Dataset.from_dict(
        {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    )


def four_bit(job: Job) -> Any:
    """NF4 with double quantisation, in transformers' words."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=job.torch_dtype,
    )


def settings(job: Job) -> dict[str, Any]:
    """What every tool built on transformers' Trainer is told; the rest stays at its defaults."""
    assert job.micro_batch is not None
    told: dict[str, Any] = {
        "output_dir": str(Path(job.out) / "checkpoints"),
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.step_rows // job.micro_batch,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job.dtype == "bf16",
        "fp16": job.dtype == "fp16",
        "use_cpu": job.device == "cpu",
        "seed": job.seed,
        "data_seed": job.seed,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job.checkpointing is not None:
        told["gradient_checkpointing"] = job.checkpointing
    return told


def start_adapter(model: torch.nn.Module, seed: int) -> None:
    """Give the adapter the same start in every tool: A drawn by name as PEFT would, B zero."""
    found = 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
        if "lora_A" not in name:
            continue
        found += 1
        layer = name[name.index("layers.") :]
        generator = torch.Generator().manual_seed(seed + zlib.crc32(layer.encode()))
        bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform with a = √5
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.data.copy_(values)
    if not found:
        raise RuntimeError("the model has no LoRA weights")


def recast_adapter(model: torch.nn.Module) -> None:
    """Put trainable weights back in fp32, where TRL has cast them to bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(job: Job, trainer: Any, watch: Watch) -> None:
    """Train with TRL's trainer, and leave result and adapter."""
    if job.tuned:
        recast_adapter(trainer.model)
    trainer.train()
    watch.write()
    trainer.model.save_pretrained(job.adapter)


class Watch(TrainerCallback):
    """Times steps, notes their losses, and reads the peak of memory at the end.

    A step lasts from the end of the one before to its own end, so that collating its rows counts.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.times: list[Any] = []
        self.losses: list[float] = []
        self.first_step_s = math.nan
        self.facts: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Start every tool from the same weights."""
        start_adapter(options["model"], self.job.seed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """The first step has no other to follow."""
        if not self.times:
            self.times.append(self._now())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Note the time; at the first step also how the tool has set itself up."""
        self.times.append(self._now())
        if len(self.times) == 2:
            if self.job.device == "cuda":
                torch.cuda.synchronize()
            self.first_step_s = time.time() - self.job.spawned_at
            self.facts = _facts(options["model"], args)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Note the loss of each step, unrounded."""
        logs = options["logs"]
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def write(self) -> None:
        """Leave the result in the job's folder."""
        result = {
            "losses": self.losses,
            "step_s": self._seconds(),
            "first_step_s": self.first_step_s,
            "peak_bytes": peak_bytes(self.job.device),
            "threads": torch.get_num_threads(),
            "versions": {name: v for name in LIBRARIES if (v := _version(name)) is not None},
            **self.facts,
        }
        (Path(self.job.out) / "result.json").write_text(json.dumps(result, indent=1))

    def _now(self) -> Any:
        if self.job.device != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self) -> list[float]:
        pairs = zip(self.times, self.times[1:], strict=False)
        if self.job.device != "cuda":
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def peak_bytes(device: str) -> int:
    """The most memory so far: allocated on CUDA, resident in this process on the CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss, which begins with the size of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _facts(model: torch.nn.Module, args: TrainingArguments) -> dict[str, Any]:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return {
        "adapter_dtype": "+".join(sorted(dtypes)),
        "checkpointing": checkpointing,
        "micro_batch": args.per_device_train_batch_size,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
