"""Owns the callbacks of training: progress bar, finiteness checks, epoch order, and sample answers."""

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
from halfbyte.errors import RunError
from halfbyte.generate.batched import generate
from halfbyte.kernels.operators import uses_operators
from halfbyte.scoring.rows import parse_answers, row_scorers, with_tool_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

    from halfbyte.train.batching import StepwiseSampler
    from halfbyte.train.tracking import Tracker

SAMPLE_BATCH = 8
# The scaler halves its scale at each overflow, so a few skipped steps are normal.
MAX_SKIPPED_STEPS = 8


class Training(Protocol):
    """The attributes of the trainer that callbacks read.

    Attributes:
        model: the model with its adapter.
        accelerator: reports whether the last optimizer step was skipped.
        tracker: records samples; None on ranks other than 0.
        sampler: orders the rows of an epoch.
        finite: whether all losses of the step so far are finite; None before its first pass.
        gradient_norm: of all gradients of the step, before they are clipped.
    """

    model: torch.nn.Module
    accelerator: Accelerator
    tracker: Tracker | None
    sampler: StepwiseSampler
    finite: torch.Tensor | None
    gradient_norm: torch.Tensor

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


class FiniteGuard(TrainerCallback):
    """Stops the run where an optimizer step would have written NaN or infinity into the adapter.

    On CUDA the optimizer itself leaves such a step out, and the verdict is read a step later, so that the host
    never waits for the device; before anything is saved or evaluated it is read at once.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.num_skipped = 0
        self.pending: tuple[int, LateFlag] | None = None  # step, and whether it was finite

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **options: Any,
    ) -> None:
        """Check the losses of the micro-batches and the norm of the gradients once per optimizer step.

        Under fp16 the gradients are left to the scaler, which skips a step that overflows.

        Raises:
            RunError: a loss or gradient is not finite; the weights are still those of the previous step.
        """
        assert self.training.finite is not None
        finite = self.training.finite
        if not args.fp16:
            finite = finite & torch.isfinite(self.training.gradient_norm)
        self.training.finite = None
        self.settle()
        self.pending = (state.global_step + 1, LateFlag(finite))
        if not (uses_operators(finite.device) and leave_out(optimizer, ~finite)):
            self.settle()

    def settle(self) -> None:
        """Read the verdict on the last step.

        Raises:
            RunError: its loss or a gradient was not finite.
        """
        if self.pending is None:
            return
        step, finite = self.pending
        self.pending = None
        if not finite.read():
            raise RunError(
                f"step {step}: the loss or a gradient is NaN or infinite. The adapter is"
                " untouched by this step; resume from the newest checkpoint with a lower"
                " train.learning_rate, or set model.compute_dtype=fp32"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Count the fp16 steps that the scaler skips in a row; settle before a checkpoint is written.

        Raises:
            RunError: too many steps in a row were skipped; the run would continue without learning. Or as
                ``settle``.
        """
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self.settle()
        skipped = self.training.accelerator.optimizer_step_was_skipped
        self.num_skipped = self.num_skipped + 1 if skipped else 0
        if self.num_skipped > MAX_SKIPPED_STEPS:
            raise RunError(
                f"step {state.global_step}: fp16 overflowed in {self.num_skipped} steps in a row, so that"
                " nothing is learnt; set model.compute_dtype=fp32"
            )


class LateFlag:
    """A truth value () on a device, copied to the host without waiting for it, and read later.

    Reading the tensor itself would wait for all that the device has been given since.
    """

    def __init__(self, flag: torch.Tensor) -> None:
        self.flag = flag
        self.event: Any = None
        if flag.is_cuda:
            self.flag = torch.empty((), dtype=flag.dtype, pin_memory=True)
            self.flag.copy_(flag, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def read(self) -> bool:
        """Return the value; wait for the copy, should it still be under way."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.flag)


def leave_out(optimizer: Any, step: torch.Tensor) -> bool:
    """Let an optimizer leave out its next step where the tensor () says so; return whether it can."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # torch's fused optimizers read this attribute, which its GradScaler sets, on the device (torch 2.13).
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.found_inf = step.float()
    return True


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
