"""Owns the trainer: TRL's SFTTrainer with our batches, loss and metrics. No other file imports TRL."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from halfbyte.forward.fuse import fuse, plain_lines
from halfbyte.forward.packed import add_token_loss
from halfbyte.forward.packed_layout import PackedLayout
from halfbyte.forward.recompute import recompute_first
from halfbyte.forward.restore import forward_kept
from halfbyte.heap import lay_out_gradients
from halfbyte.kernels.operators import use_kernels, uses_operators
from halfbyte.model.adapter import adapted_layers, adapters_kept, trainable_parameters
from halfbyte.train.arguments import num_steps, trainer_arguments
from halfbyte.train.batching import Cutting, StepwiseSampler, warn_of_padding
from halfbyte.train.branch import own_settings
from halfbyte.train.callbacks import EpochOrder, Progress, SampleAnswers
from halfbyte.train.checkpoints import STAGED, staged
from halfbyte.train.finite import check_finite
from halfbyte.train.guards import FiniteGuard, check_labels
from halfbyte.train.held_out import EvaluationCutError, held_out_losses, of_main_process
from halfbyte.train.learning import LearningGuard
from halfbyte.train.measure import memory_bytes
from halfbyte.train.rehearsal import Rehearsal
from halfbyte.train.settle_dtype import scale_losses
from halfbyte.train.setup import Setup
from halfbyte.train.source_losses import SourceLosses
from halfbyte.train.tracking import Tracker


class TokenTrainer(SFTTrainer):
    """SFTTrainer whose loss is the mean over labelled tokens of the whole optimizer step.

    TRL's loss scores every position on CPU, and its evaluation averages batch means; here both are sums
    over labelled tokens divided by their number, each token with the weight of its row.

    Args:
        setup: rows, base with adapter, and how a step is split; the model already has ``token_loss``.
        cutting: how rows are divided into passes.
        checkpoints: folder for checkpoints.
        tracker: records the metrics; None on ranks other than 0.
    """

    def __init__(
        self, setup: Setup, cutting: Cutting, checkpoints: Path, tracker: Tracker | None
    ) -> None:
        self.control: TrainerControl
        self.tracker, self.cutting = tracker, cutting
        self.run, self.samples, self.step_rows = setup.run, setup.train, list[int]()
        self.rows, self.held_out = setup.train.tokens, setup.held_out.tokens
        self.weights, self.held_out_weights = setup.train.weights, setup.held_out.weights
        self.losses = SourceLosses.of(setup)
        self.varlen = setup.run.allowed_speed.varlen_attention and uses_operators(
            setup.loaded.compute.device
        )
        self.num_tokens = tracker.num_tokens if tracker is not None else 0
        self.evaluated = tracker.evaluated if tracker else (-1, None)  # step and held-out loss
        self.checkpoints, self.num_kept = checkpoints, setup.run.train.keep_checkpoints
        self.saved_step, self.seconds = -1, 0.0
        self.num_steps = num_steps(setup.run, len(setup.train))
        self.sampler: StepwiseSampler
        self.finite: torch.Tensor | None = None
        self.gradient_norm = torch.tensor(0.0)
        self.trained = list(trainable_parameters(setup.model).values())
        self.evaluates = self.cuts_evaluation = self.owes_evaluation = False  # see StopGuard
        self._gradients: torch.Tensor | None = None
        self._since = (0, time.perf_counter())
        samples, model = setup.held_out[: setup.run.train.num_samples], setup.model
        # The loader yields row numbers only; the rows stay in place.
        numbers = Dataset.from_dict({"row": range(len(self.rows))})
        # TRL replaces the model's forward and rounds the adapter; both changes are undone.
        with adapters_kept(model), forward_kept(model.get_base_model()):
            super().__init__(
                model=model,
                args=_sft_config(setup, checkpoints),
                data_collator=self._collate,
                train_dataset=numbers,
                # It only has to exist: `evaluate` reads `held_out`.
                eval_dataset=numbers.select(range(1)) if self.held_out else None,
                processing_class=setup.renderer.tokenizer,
                callbacks=[
                    Rehearsal(self),
                    Progress(),
                    FiniteGuard(self),
                    LearningGuard(self),
                    EpochOrder(self),
                    SampleAnswers(self, samples, setup.renderer, setup.run),
                ],
            )
        self.remove_callback(PrinterCallback)
        if self.args.fp16:
            scale_losses(self.accelerator)

    def _collate(self, numbers: list[dict[str, int]]) -> dict[str, Any]:
        """Split the rows of an optimizer step into passes."""
        rows = [number["row"] for number in numbers]
        step = [self.rows[row] for row in rows]
        weights = self.weights and [self.weights[row] for row in rows]
        groups = self.losses and [self.losses.train[row] for row in rows]
        layouts = self.cutting.step(step, weights, groups or ())
        num_groups = len(self.losses.names) if self.losses else 0
        return {
            "rows": rows,
            "layouts": [
                PackedLayout.of(layout, varlen=self.varlen, num_groups=num_groups)
                for layout in layouts
            ],
            "divisor": check_labels(
                sum(sum(layout.counts) for layout in layouts),
                (self.samples[row].row.place for row in rows),
            ),
            "num_tokens": sum(layout.num_tokens for layout in layouts),
        }

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> float | torch.Tensor:
        """Return the weights of all labelled tokens of a step, over all processes.

        The transformers method counts labels in a tensor of its own, which it copies to the device.
        """
        divisor: float = sum(batch["divisor"] for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return divisor
        total: torch.Tensor = self.accelerator.reduce(torch.tensor(divisor, device=device), "sum")
        return total

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        lengths = self.rows.sizes.tolist()
        world = self.accelerator.num_processes
        step_rows = self.args.per_device_train_batch_size * world
        self.sampler = StepwiseSampler(lengths, step_rows, self.args.seed, world)
        return self.sampler

    def train_to_end(self, resume: Path | None) -> None:
        """Train until all steps are done, starting from a checkpoint if one is given."""
        self._since = (self.num_tokens, start := time.perf_counter())
        self.evaluated = of_main_process(self.evaluated, self.accelerator)
        if resume is not None:
            state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
            if state.global_step >= self.num_steps:
                # transformers would take one step too many.
                self._load_from_checkpoint(str(resume))
                self.state = state
                return
            every = self.run.train.eval_steps or self.num_steps
            is_owed = state.global_step % every == 0 and self.evaluated[0] != state.global_step
            self.owes_evaluation = is_owed and self.accelerator.num_processes == 1
        self.train(resume_from_checkpoint=str(resume) if resume else None)
        self.seconds = time.perf_counter() - start

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run the passes of a step forward and backward; return its loss in nats per labelled token.

        The transformers method makes one pass of a fixed number of rows; this one makes as few as fit.
        """
        assert num_items_in_batch is not None, "transformers counted no labelled tokens"
        self.step_rows = inputs["rows"]
        if not model.training:  # to set it walks all modules
            model.train()
        if len(inputs["layouts"]) > 1 and self.args.device.type == "cpu":
            self._gradients = lay_out_gradients(self.trained, self._gradients)
        total: torch.Tensor | None = None
        last = len(inputs["layouts"]) - 1
        for number, layout in enumerate(inputs["layouts"]):
            alone = contextlib.nullcontext() if number == last else self.accelerator.no_sync(model)
            with alone:
                with self.compute_loss_context_manager():
                    if self.losses is None:
                        loss = model(layout=layout) / num_items_in_batch
                    else:
                        each = model(layout=layout, token_loss="each")
                        loss = self.losses.add(layout, each) / num_items_in_batch
                # DDP averages gradients over processes, but the divisor already counts all their tokens.
                loss = loss * self.accelerator.num_processes
                self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        finite = torch.isfinite(total)
        self.finite = finite if self.finite is None else self.finite & finite
        self.num_tokens += inputs["num_tokens"] * self.accelerator.num_processes
        return total

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:  # without a walk over all modules
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Internal to transformers, tried with 5.23: called once a step, after clipping, with its norm. Without
        # the method the guard would not see gradients, and its tests would fail.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.gradient_norm = torch.as_tensor(norm, device=self.args.device)
        return norm

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the parameters that decay: LoRA matrices, which begin near 0, but no rows of new tokens."""
        decaying = super().get_decay_parameter_names(model)
        return [name for name in decaying if "trainable_tokens_delta" not in name]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: transformers would walk all parameters for it."""
        return 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the held-out loss in nats per labelled token, over all processes."""
        self.evaluates = True
        if self.cuts_evaluation:
            raise EvaluationCutError
        rows, weights = self.held_out, self.held_out_weights
        with self.compute_loss_context_manager():
            loss, by_source = held_out_losses(
                self.model, self.cutting, rows, weights, self.losses, self.accelerator
            )
        self.evaluated = (self.state.global_step, loss)
        key = f"{metric_key_prefix}_loss"
        metrics = {key: loss} | {f"{key}/{name}": mean for name, mean in by_source.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.evaluates = False
        return metrics

    def final_loss(self) -> float | None:
        """Return the held-out loss of the trained adapter, measured now unless the last step did so."""
        if self.held_out and self.evaluated[0] != self.state.global_step:
            self.evaluate()
        return self.evaluated[1]

    @torch.no_grad()
    def last_logits(self, ids: list[int]) -> torch.Tensor:
        """Return the current model's logits (V,) after ``ids``, on the CPU."""
        self.model.eval()
        with self.compute_loss_context_manager():
            input_ids = torch.tensor([ids], device=self.args.device)
            return self.model(input_ids=input_ids).logits[0, -1].float().cpu()  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second and memory, write the record, and update the Trainer's own history."""
        if "loss" in logs:
            tokens, since = self._since
            now = time.perf_counter()
            logs["tokens_per_s"] = (self.num_tokens - tokens) / (now - since)
            logs["num_tokens"] = self.num_tokens
            logs["memory_bytes"] = memory_bytes(self.args.device)
            if self.losses is not None:
                means = self.losses.take(self.accelerator)
                logs |= {f"loss/{name}": mean for name, mean in means.items()}
            self._since = (self.num_tokens, now)
            if self.args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):
                # The scaler found an overflow and skipped the step; FiniteGuard counts such steps.
                del logs["grad_norm"]
                logs["skipped_step"] = 1
        # The Trainer's final summary is not a step; it goes to the manifest.
        if self.tracker is not None and ("loss" in logs or "eval_loss" in logs):
            record: dict[str, Any] = {
                "step": self.state.global_step,
                "epoch": self.state.epoch or 0.0,
            }
            self.tracker.write(record | logs)
        super(SFTTrainer, self).log(logs, start_time)

    def numbers(self) -> dict[str, Any]:
        """Return figures of the finished run for the manifest; all processes must call this together."""
        return {
            "training_seconds": self.seconds,
            "held_out_loss": self.final_loss(),
            "steps": self.state.global_step,
            "num_tokens": self.num_tokens,
            "trainable": sum(p.numel() for p in self.trained),
            "adapted_layers": len(adapted_layers(self.model)),
            "peak_memory_bytes": memory_bytes(self.args.device),
        }

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **options)
        except EvaluationCutError:
            self.control.should_training_stop = True
            self._save_checkpoint(self.model, None)
        # Time spent on evaluating and saving does not count as training time.
        if self.state.global_step in (self.evaluated[0], self.saved_step):
            self._since = (self.num_tokens, time.perf_counter())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with own_settings(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.state.global_step:
            check_finite(self.state.global_step, self.trained, self.optimizer)
        with staged(self.checkpoints, self.state.global_step, self.num_kept, self.accelerator):
            super()._save_checkpoint(model, trial)
        self.saved_step = self.state.global_step

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints / STAGED)  # where the Trainer writes and rotates: one at a time

    def create_model_card(self, *args: Any, **options: Any) -> None:  # shipped models get their own
        """Skip TRL's card."""


def build_trainer(setup: Setup, checkpoints: Path, tracker: Tracker | None) -> TokenTrainer:
    """Fuse the model, decide how its rows are laid out, and build TRL's trainer with both.

    Args:
        setup: rows, base with adapter, and how a step is split.
        checkpoints: folder for checkpoints.
        tracker: records the metrics; None on ranks other than 0.
    """
    causal, speed = setup.model.get_base_model(), setup.run.allowed_speed
    if setup.passes.recompute is not None:
        recompute_first(causal, setup.passes.recompute)
    use_kernels(speed.kernels)
    refusal = add_token_loss(
        causal, labelled_head=speed.labelled_head, varlen=speed.varlen_attention
    )
    compute = setup.loaded.compute
    fuse(setup.model, speed, compute.dtype)
    cutting = Cutting.of(setup.train.tokens, setup.passes.micro_batch_size, speed, refusal)
    if tracker is not None:
        warn_of_padding(setup.run, cutting, refusal)
        for line in plain_lines(setup.model, speed, compute.device):
            print(line)
    return TokenTrainer(setup, cutting, checkpoints, tracker)


def _sft_config(setup: Setup, checkpoints: Path) -> SFTConfig:
    arguments = trainer_arguments(setup.run, setup.loaded, setup.passes, len(setup.train))
    config = SFTConfig(output_dir=str(checkpoints), **arguments)
    # With several GPUs in one process, transformers would multiply the batch size by their number.
    config._n_gpu = min(config.n_gpu, 1)
    return config
