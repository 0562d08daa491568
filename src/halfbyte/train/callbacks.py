"""Owns what happens beside the steps: progress bar, finiteness, epoch order, samples to read along."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.data.prepared import Example
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.generate.batched import generate
from halfbyte.model.adapter import trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from halfbyte.train.batching import StepwiseSampler
    from halfbyte.train.tracking import Tracker

SAMPLE_BATCH = 8
# The scaler begins at 65,536 and halves at each overflow; a few skipped steps are its search.
MAX_SKIPPED_STEPS = 8


class Training(Protocol):
    """What callbacks read of the trainer.

    Attributes:
        model: with its adapter.
        accelerator: knows whether the last optimizer step was skipped.
        tracker: takes samples; None on other ranks than 0.
        sampler: orders the rows of an epoch.
        finite: whether all losses of the step so far are finite; None before its first pass.
    """

    model: torch.nn.Module
    accelerator: Accelerator
    tracker: Tracker | None
    sampler: StepwiseSampler
    finite: torch.Tensor | None

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Enter the autocast of training."""


class Progress(TrainerCallback):
    """A bar with steps, loss, tokens per second and the time that is left."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Open the bar; with a resumed run it begins where that stopped."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        """Show the newest numbers."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:.0f} tokens/s"
            )
        if "eval_loss" in logs:
            line = f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}"
            self.bar.write(line, sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class FiniteGuard(TrainerCallback):
    """Stops before an optimizer step that would write NaN or infinity into the adapter."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.num_skipped = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """One look per optimizer step at the losses of its micro-batches and at the gradients.

        Under fp16 the gradients are the scaler's to judge: it skips a step that overflows.

        Raises:
            RunError: something is not finite; the weights are still those of the step before.
        """
        assert self.training.finite is not None
        finite = self.training.finite
        if not args.fp16:
            gradients = [p.grad for p in trainable_parameters(self.training.model).values()]
            norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
            finite = finite & torch.isfinite(norm)
        self.training.finite = None
        if not bool(finite):
            raise RunError(
                f"step {state.global_step + 1}: the loss or a gradient is NaN or infinite. The adapter is"
                " untouched by this step; resume from the newest checkpoint with a lower"
                " train.learning_rate, or set model.compute_dtype=fp32"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Count fp16 steps that the scaler skipped.

        Raises:
            RunError: too many in a row; the run would go on without learning anything.
        """
        skipped = self.training.accelerator.optimizer_step_was_skipped
        self.num_skipped = self.num_skipped + 1 if skipped else 0
        if self.num_skipped > MAX_SKIPPED_STEPS:
            raise RunError(
                f"step {state.global_step}: fp16 overflowed in {self.num_skipped} steps in a row, so that"
                " nothing is learnt; set model.compute_dtype=fp32"
            )


class EpochOrder(TrainerCallback):
    """Gives the sampler its epoch, also where a resumed loader hides it behind wrappers."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """A run resumed in mid-epoch goes on with that epoch's own order."""
        # 1.9999999 is the rounded end of epoch 1, that is the beginning of epoch 2.
        self.training.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class Samples(TrainerCallback):
    """Answers to a few held-out prompts at each evaluation."""

    def __init__(
        self, training: Training, examples: list[Example], renderer: Renderer, max_new_tokens: int
    ) -> None:
        self.training = training
        # Raw text has no prompt to answer.
        self.examples = [example for example in examples if example.row.text is None]
        self.renderer = renderer
        self.max_new_tokens = max_new_tokens

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Generate greedily and hand the answers to the tracker."""
        tracker = self.training.tracker
        if tracker is None or not self.examples:
            return
        prompts = [self.renderer.encode_prompt(e.row.messages[:-1]) for e in self.examples]
        with self.training.compute_loss_context_manager():
            answers = generate(
                self.training.model,
                prompts,
                stop_ids=self.renderer.stop_ids,
                pad_id=self.renderer.pad_id,
                max_new_tokens=self.max_new_tokens,
                batch_rows=SAMPLE_BATCH,
            )
        tracker.write_samples(
            state.global_step,
            [
                {
                    "prompt": example.row.messages[-2].content,
                    "wanted": example.row.answer,
                    "answer": self.renderer.decode(answer.ids),
                }
                for example, answer in zip(self.examples, answers, strict=True)
            ],
        )
