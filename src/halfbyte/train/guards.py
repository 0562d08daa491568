"""Owns what stops a training in the step in which a number is not finite, before anything of it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.errors import RunError
from halfbyte.faults import sealed_steps, train_command
from halfbyte.kernels.operators import uses_operators
from halfbyte.train.diagnosis import Guarded, broken_weight, named, why_not_finite
from halfbyte.train.finite import all_finite, optimizer_states

# The scaler halves its scale at each overflow, so a few skipped steps are normal.
MAX_SKIPPED_STEPS = 8
QUARTER = 0.25


class FiniteGuard(TrainerCallback):
    """Stops the run in the step in which a loss, a gradient, a weight or an optimizer state is NaN or infinite.

    On CUDA the optimizer itself leaves such a step out, and the verdict is read a step later, so that the host
    never waits for the device; before anything is saved or evaluated it is read at once.
    """

    def __init__(self, training: Guarded) -> None:
        self.training = training
        self.num_skipped = 0
        # Whether losses and gradients of the step under way are finite, where the device alone knows.
        self.before: torch.Tensor | None = None
        # A step, whether all was finite before and after it, and its rows.
        self.pending: tuple[int, LateFlags, Sequence[int]] | None = None

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
        if uses_operators(finite.device) and leave_out(optimizer, ~finite):
            self.before = finite
        elif not finite:
            raise self._error(state.global_step + 1, self.training.step_rows, after=False)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **options: Any,
    ) -> None:
        """Check the weights and the optimizer's states that the step has left.

        Raises:
            RunError: one is not finite; nothing of this step is saved.
        """
        finite = all_finite([*self.training.trained, *optimizer_states(optimizer)])
        before, self.before = self.before, None
        flags = torch.stack([torch.ones_like(finite) if before is None else before, finite])
        self.pending = (state.global_step + 1, LateFlags(flags), self.training.step_rows)
        if not uses_operators(finite.device):
            self.settle()

    def settle(self) -> None:
        """Read the verdict that is still open.

        Raises:
            RunError: something of a step was not finite.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        step, flags, rows = pending
        if not flags.all():
            raise self._error(step, rows, after=bool(flags.values[0]))

    def _error(self, step: int, rows: Sequence[int], *, after: bool) -> RunError:
        if after:
            name = broken_weight(self.training.model, trained=True)
            what = f"the adapter's weight {name}" if name else "a state of the optimizer"
            why, by_settings = (
                f"{what} is NaN or infinite after it, though loss and gradients were finite",
                False,
            )
        else:
            why, by_settings = why_not_finite(self.training, rows)
        rate = self.training.run.train.learning_rate * QUARTER
        change = f"train.learning_rate={rate:g}" if by_settings else ""
        back = way_on(self.training.checkpoints.parent, change)
        return RunError(f"step {step}: {why}. Nothing of this step is saved. {back}")

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
            folder = self.training.checkpoints.parent
            raise RunError(
                f"step {state.global_step}: fp16 overflowed in {self.num_skipped} steps in a row, so that"
                f" nothing is learnt. {way_on(folder, 'model.compute_dtype=fp32')}"
            )


class LateFlags:
    """Truth values on a device, copied to the host without waiting for them, and read later.

    Reading the tensor itself would wait for all that the device has been given since.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self.values = flags
        self.event: Any = None
        if flags.is_cuda:
            self.values = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self.values.copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def all(self) -> bool:
        """Return whether all are true; wait for the copy, should it still be under way."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.values.all())


def leave_out(optimizer: Any, step: torch.Tensor) -> bool:
    """Let an optimizer leave out its next step where the tensor () says so; return whether it can."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # torch's fused optimizers read this attribute, which its GradScaler sets, on the device (torch 2.13).
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.found_inf = step.float()
    return True


def check_labels(divisor: float, places: Iterable[str]) -> float:
    """Return the weight of all labelled tokens of a step.

    Raises:
        RunError: there is none, so that its loss would be 0/0.
    """
    if not divisor:
        raise RunError(f"a step has no labelled token of any weight; its rows are {named(places)}")
    return divisor


def way_on(folder: Path, change: str = "", *, anew: bool = False) -> str:
    """Return the command with which a stopped training goes on.

    Args:
        folder: the run folder.
        change: a setting to change, as an override.
        anew: whether what was learnt so far is of no use.
    """
    whole = sealed_steps(folder)
    config, changes = folder / "run.yaml", change.split()
    if anew or not whole:
        return f"Start over: {train_command(config, 'train.existing=replace', *changes)}"
    if not change:
        return f"Go on from checkpoint-{whole[-1]}: {train_command(config)}"
    steps = f"train.resume_from={whole[-1]}"
    return f"Go back to checkpoint-{whole[-1]}: {train_command(config, steps, *changes)}"
