"""Owns what happens beside the steps: the progress bar, the finiteness guard, samples to read along."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.data.prepare import Example
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.model.generate import generate
from halfbyte.train.trainer import TokenTrainer

SAMPLE_BATCH = 8


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
            self.bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", sys.stderr
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class FiniteGuard(TrainerCallback):
    """Stops before an optimizer step that would write NaN or infinity into the adapter."""

    def __init__(self) -> None:
        self.trainer: TokenTrainer | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """One look per optimizer step at whether every micro-batch had a finite loss.

        Raises:
            RunError: one had not; the weights are still those of the step before.
        """
        assert self.trainer is not None
        assert self.trainer.finite is not None
        if not bool(self.trainer.finite):
            raise RunError(
                f"step {state.global_step + 1}: the loss is NaN or infinite. The adapter is untouched by"
                " this step; resume from the newest checkpoint with a lower train.learning_rate, or set"
                " model.compute_dtype=fp32"
            )
        self.trainer.finite = None


class Samples(TrainerCallback):
    """Answers to a few held-out prompts at each evaluation."""

    def __init__(self, examples: list[Example], renderer: Renderer, max_new_tokens: int) -> None:
        self.examples = examples
        self.renderer = renderer
        self.max_new_tokens = max_new_tokens
        self.trainer: TokenTrainer | None = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Generate greedily and hand the answers to the tracker."""
        assert self.trainer is not None
        tracker = self.trainer.tracker
        if tracker is None or not self.examples:
            return
        prompts = [self.renderer.encode_prompt(e.row.messages[:-1]) for e in self.examples]
        answers = generate(
            self.trainer.model,
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
