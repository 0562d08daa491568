"""Owns the translation of our settings into transformers' arguments; whatever matters is set explicitly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.config.schema import Run
from halfbyte.host import num_processes
from halfbyte.model.load import Loaded
from halfbyte.plan.memory import TrainPlan


@dataclass(frozen=True)
class Passes:
    """How a step is split: rows per forward pass, and whether activations are recomputed.

    ``recompute`` is the number of layers, counted from the first, that are recomputed; None means all.
    """

    micro_batch_size: int
    checkpointing: bool
    recompute: int | None = None

    @classmethod
    def of(cls, run: Run, plan: TrainPlan | None) -> Passes:
        """Follow the plan or, without one, the config, where ``auto`` becomes one row and recomputing."""
        if plan is not None:
            return cls(plan.micro_batch_size, plan.checkpointing, plan.shape.recompute)
        train = run.train
        rows = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
        return cls(rows, train.checkpointing != "off", train.recomputed_layers)


def num_steps(run: Run, num_rows: int) -> int:
    """Return the number of optimizer steps in the whole run."""
    an_epoch = math.ceil(num_rows / run.train.batch_size)
    return run.train.max_steps or max(1, math.ceil(an_epoch * run.train.epochs))


def describe_schedule(run: Run, num_rows: int) -> str:
    """Return in words how many steps there are, and after how many rates, losses and checkpoints change or come."""
    train, steps = run.train, num_steps(run, num_rows)
    parts = [
        f"{steps} steps of {train.batch_size} rows",
        f"{train.scheduler} from {train.learning_rate:g} after {num_warmup_steps(run, num_rows)} to warm up",
        f"a held-out loss every {train.eval_steps}"
        if train.eval_steps
        else "a held-out loss at the end",
        f"a checkpoint every {train.save_steps}" if train.save_steps else "no checkpoint",
    ]
    return ", ".join(parts)


def num_warmup_steps(run: Run, num_rows: int) -> int:
    """Return the number of optimizer steps in which the learning rate rises."""
    share = 0.0 if run.train.scheduler == "constant" else run.train.warmup_frac
    return math.ceil(num_steps(run, num_rows) * share)


def trainer_arguments(run: Run, loaded: Loaded, passes: Passes, num_rows: int) -> dict[str, Any]:
    """Return the keyword arguments of SFTConfig, except for the output folder.

    Args:
        run: the config.
        loaded: how the base was loaded.
        passes: how each step is split, with ``auto`` resolved by the plan.
        num_rows: number of training rows.
    """
    train = run.train
    dtype, device = loaded.compute.dtype, loaded.compute.device
    recompute = passes.checkpointing
    if train.optimizer.startswith("paged") and device.type == "cpu":
        print(
            f"warning: train.optimizer {train.optimizer} pages nothing on the CPU; use adamw_torch_fused"
        )
    return {
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        # The loader yields a whole step as one batch, which the trainer splits into passes.
        "per_device_train_batch_size": train.batch_size // num_processes(),
        "per_device_eval_batch_size": passes.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "optim": train.optimizer,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": num_warmup_steps(run, num_rows),
        "neftune_noise_alpha": train.neftune_alpha,
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": run.training_seed,
        "data_seed": run.training_seed,
        "eval_strategy": "steps" if train.eval_steps else "no",
        "eval_steps": train.eval_steps or None,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "logging_steps": train.log_steps,
        "logging_first_step": True,
        # By default transformers logs a NaN loss as 0.0.
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        # Batches are copied to the device while the step before computes.
        "accelerator_config": {"non_blocking": device.type == "cuda"},
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
    }
