"""Owns the callbacks of training: progress bar, epoch order, and sample answers."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.config import Run
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Samples
from halfbyte.generate.batched import generate
from halfbyte.scoring.rows import parse_answers, row_scorers, with_tool_metrics

if TYPE_CHECKING:
    from halfbyte.train.batching import StepwiseSampler
    from halfbyte.train.tracking import Tracker

SAMPLE_BATCH = 8


class Training(Protocol):
    """The attributes of the trainer that callbacks read.

    Attributes:
        model: the model with its adapter.
        tracker: records samples; None on ranks other than 0.
        sampler: orders the rows of an epoch.
    """

    model: torch.nn.Module
    tracker: Tracker | None
    sampler: StepwiseSampler

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Enter the autocast of training."""


class Progress(TrainerCallback):
    """A progress bar with steps, loss, tokens per second and the remaining time."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Open the bar; for a resumed run it starts at the step where the run stopped."""
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
        """Show the latest numbers."""
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


class EpochOrder(TrainerCallback):
    """Sets the sampler's epoch, even when a resumed loader hides the sampler behind wrappers."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Set the epoch, so that a run resumed in mid-epoch continues in that epoch's order."""
        # Rounding can turn the start of epoch 2 into 1.9999999.
        self.training.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class SampleAnswers(TrainerCallback):
    """Answers a few held-out prompts at each evaluation."""

    def __init__(self, training: Training, examples: Samples, renderer: Renderer, run: Run) -> None:
        self.training = training
        # Raw text has no prompt to answer.
        self.examples = [example for example in examples if example.row.text is None]
        self.renderer = renderer
        self.max_new_tokens = run.train.sample_tokens
        # Made now, so that a metric that cannot be had is an error before the first step.
        run = with_tool_metrics(run, [example.row for example in self.examples])
        self.scorers = row_scorers(run) if self.examples else {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Generate answers greedily and pass them to the tracker."""
        tracker = self.training.tracker
        if tracker is None or not self.examples:
            return
        prompts = [
            self.renderer.encode_prompt(e.row.messages[:-1], e.row.place, e.row.tools)
            for e in self.examples
        ]
        with self.training.compute_loss_context_manager():
            answers = generate(
                self.training.model,
                prompts,
                stop_ids=self.renderer.stop_ids,
                pad_id=self.renderer.pad_id,
                max_new_tokens=self.max_new_tokens,
                batch_rows=SAMPLE_BATCH,
            )
        texts = [self.renderer.decode(answer.ids) for answer in answers]
        rows = [example.row for example in self.examples]
        parsed = parse_answers(texts, rows, self.renderer.answer_format)
        tracker.write_samples(
            state.global_step,
            [
                {
                    "prompt": row.messages[-2].content,
                    "wanted": self.renderer.wanted_text(row),
                    "answer": text,
                    **{name: score(answer, row) for name, score in self.scorers.items()},
                }
                for row, text, answer in zip(rows, texts, parsed, strict=True)
            ],
        )
