"""Owns the trainer: TRL's SFTTrainer with our batches, our loss and our numbers. The one file that knows TRL."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerControl
from trl import SFTConfig, SFTTrainer

from halfbyte.config.schema import Run
from halfbyte.data.prepare import Example
from halfbyte.errors import RunError
from halfbyte.model.activations import needs_checkpointing
from halfbyte.model.adapter import adapters_kept, trainable_parameters
from halfbyte.model.load import Loaded
from halfbyte.model.loss import add_token_loss, pad_right, summed_loss
from halfbyte.train.order import StepwiseSampler
from halfbyte.train.tracking import Tracker

NO_STRATEGY = "no"


class TokenTrainer(SFTTrainer):
    """SFTTrainer whose loss is the mean over labelled tokens of the whole optimizer step.

    Differs from TRL's where its loss scores every position on CPU and its evaluation averages
    batch means: here both are sums over labelled tokens divided by their number.
    """

    # Tells transformers that compute_loss divides by the tokens of the whole accumulation window.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        tracker: Tracker | None,
        step_rows: int,
        held_out: list[tuple[list[int], list[int]]],
        **options: Any,
    ) -> None:
        self.control: TrainerControl
        self.tracker = tracker
        self.step_rows = step_rows
        self.held_out = held_out
        self.num_tokens = 0
        self.evaluated_step = -1
        self.held_out_loss: float | None = None
        self.finite: torch.Tensor | None = None
        self._since = (0, time.perf_counter())
        super().__init__(*args, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in data["input_ids"]]
        return StepwiseSampler(lengths, self.step_rows, self.args.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Summed loss of a micro-batch over the labelled tokens of the optimizer step, in nats."""
        assert num_items_in_batch is not None, "transformers counted no labelled tokens"
        total: torch.Tensor = model(
            input_ids=inputs["input_ids"], labels=inputs["labels"], token_loss=True
        )
        finite = torch.isfinite(total.detach())
        self.finite = finite if self.finite is None else self.finite & finite
        self.num_tokens += inputs["num_tokens"] * self.accelerator.num_processes
        # DDP averages gradients over processes, while the divisor counts the tokens of all.
        loss: torch.Tensor = total / num_items_in_batch * self.accelerator.num_processes
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out loss in nats per labelled token, over all processes."""
        state = self.accelerator
        mine = self.held_out[state.process_index :: state.num_processes]
        pad_id: int = self.processing_class.pad_token_id
        batch_rows = self.args.per_device_eval_batch_size
        with self.compute_loss_context_manager():
            total, count = summed_loss(self.model, mine, pad_id, batch_rows) if mine else (0.0, 0)
        sums = state.reduce(torch.tensor([total, count], dtype=torch.float64, device=state.device))
        loss = float(sums[0] / sums[1])
        self.evaluated_step, self.held_out_loss = self.state.global_step, loss
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        # What evaluation took is no training time.
        self._since = (self.num_tokens, time.perf_counter())
        return metrics

    def final_loss(self) -> float | None:
        """Held-out loss of the trained adapter; measured now unless the last step has done so."""
        if self.held_out and self.evaluated_step != self.state.global_step:
            self.evaluate()
        return self.held_out_loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second and memory, write the record, and keep the Trainer's own history."""
        if "loss" in logs:
            tokens, since = self._since
            now = time.perf_counter()
            logs["tokens_per_s"] = (self.num_tokens - tokens) / (now - since)
            logs["num_tokens"] = self.num_tokens
            logs["memory_bytes"] = memory_bytes(self.args.device)
            self._since = (self.num_tokens, now)
        # The closing summary of the Trainer is no step: it goes to the manifest.
        if self.tracker is not None and ("loss" in logs or "eval_loss" in logs):
            record: dict[str, Any] = {
                "step": self.state.global_step,
                "epoch": self.state.epoch or 0.0,
            }
            self.tracker.write(record | logs)
        super(SFTTrainer, self).log(logs, start_time)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Leave out TRL's card: what is shipped gets a card of its own with measured figures."""


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on CUDA, resident in this process on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def build_trainer(
    run: Run,
    model: PeftModel,
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    examples: tuple[list[Example], list[Example]],
    checkpoints: Path,
    tracker: Tracker | None,
    callbacks: list[Any],
) -> TokenTrainer:
    """Put our model, rows and settings into TRL's trainer.

    Args:
        run: the config.
        model: the base with its adapter.
        loaded: how the base was loaded.
        tokenizer: of the base; only its pad id is used.
        examples: training rows and held-out rows.
        checkpoints: folder for checkpoints.
        tracker: where numbers go; None on other ranks than 0.
        callbacks: further callbacks.
    """
    train, held_out = examples
    pad_id = int(tokenizer.pad_token_id)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        batch: dict[str, Any] = pad_right([(r["input_ids"], r["labels"]) for r in rows], pad_id)
        return batch | {"num_tokens": sum(len(row["input_ids"]) for row in rows)}

    longest = max(len(example.encoded.ids) for example in train)
    arguments = trainer_arguments(run, loaded, num_rows=len(train), longest=longest)
    data = Dataset.from_dict(
        {
            "input_ids": [example.encoded.ids for example in train],
            "labels": [example.encoded.labels for example in train],
        }
    )
    with adapters_kept(model):
        trainer = TokenTrainer(
            model=model,
            args=SFTConfig(output_dir=str(checkpoints), **arguments),
            data_collator=collate,
            train_dataset=data,
            # Only its presence counts: `evaluate` reads `held_out`.
            eval_dataset=data.select(range(1)) if held_out else None,
            processing_class=tokenizer,
            callbacks=callbacks,
            tracker=tracker,
            step_rows=run.train.batch_size,
            held_out=[(e.encoded.ids, e.encoded.labels) for e in held_out],
        )
    trainer.remove_callback(PrinterCallback)
    add_token_loss(model.get_base_model())
    return trainer


def trainer_arguments(run: Run, loaded: Loaded, *, num_rows: int, longest: int) -> dict[str, Any]:
    """Our settings in transformers' words; everything that matters is said explicitly."""
    train = run.train
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = train.batch_size // (train.micro_batch_size * world)
    steps = train.max_steps or max(
        1, math.ceil(math.ceil(num_rows / train.batch_size) * train.epochs)
    )
    dtype, device = loaded.compute.dtype, loaded.compute.device
    recompute = train.checkpointing == "on" or (
        train.checkpointing == "auto"
        and needs_checkpointing(
            loaded.model.config, train.micro_batch_size * longest, dtype, device
        )
    )
    return {
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "optim": train.optimizer,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": 0
        if train.scheduler == "constant"
        else math.ceil(steps * train.warmup_frac),
        "neftune_noise_alpha": train.neftune_alpha,
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": run.seed,
        "data_seed": run.seed,
        "eval_strategy": "steps" if train.eval_steps else NO_STRATEGY,
        "eval_steps": train.eval_steps or None,
        "save_strategy": "steps" if train.save_steps else NO_STRATEGY,
        "save_steps": train.save_steps or 500,
        "save_total_limit": train.keep_checkpoints,
        "logging_steps": train.log_steps,
        "logging_first_step": True,
        # transformers shows a NaN loss as 0.0 by default.
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
    }


def check_first_step(trainer: TokenTrainer) -> float:
    """One forward and backward on the longest micro-batch, before anything is spent.

    Changes neither weights nor random state. Returns the loss in nats per labelled token.

    Raises:
        RunError: the loss or a gradient is not finite, or an adapter gets no gradient.
    """
    data: Any = trainer.train_dataset
    order = sorted(range(len(data)), key=lambda row: -len(data[row]["input_ids"]))
    rows = [data[row] for row in order[: trainer.args.per_device_train_batch_size]]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    num_labels = int((batch["labels"][:, 1:] >= 0).sum())
    model = trainer.model
    with torch.random.fork_rng(), trainer.compute_loss_context_manager():
        model.train()
        loss = (
            model(input_ids=batch["input_ids"], labels=batch["labels"], token_loss=True)
            / num_labels
        )
        value = float(loss.item())
        if not math.isfinite(value):
            raise RunError(
                f"before step 1: the loss on the longest rows is {value}: activations overflow in the"
                " compute dtype; set model.compute_dtype=fp32"
            )
        loss.backward()
    faults = []
    for name, parameter in trainable_parameters(model).items():
        gradient = parameter.grad
        if gradient is None or not torch.isfinite(gradient).all():
            faults.append(
                f"{name}: {'no gradient' if gradient is None else 'NaN or infinite gradient'}"
            )
        elif "lora_B" in name and not gradient.abs().max() > 0:
            faults.append(f"{name}: the gradient is zero everywhere")
    model.zero_grad(set_to_none=True)
    if faults:
        raise RunError(
            f"before step 1: {len(faults)} adapter weights cannot learn: {'; '.join(faults[:3])}"
        )
    return value
