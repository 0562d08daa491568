"""Owns the rehearsal of a checkpoint: before the first step one is written, read back and compared with memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.errors import RunError
from halfbyte.model.adapter import saved_difference
from halfbyte.train.checkpoints import STAGED, fault_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

    from halfbyte.config import Run


class Saving(Protocol):
    """The attributes of the trainer that a rehearsal uses.

    Attributes:
        model: the model with its adapter.
        run: the config.
        checkpoints: folder for checkpoints.
        accelerator: knows the processes that train together.
    """

    model: PeftModel
    run: Run
    checkpoints: Path
    accelerator: Accelerator

    def _save_checkpoint(self, model: Any, trial: Any) -> None: ...


class RehearsedError(Exception):
    """Everything before the first step was done, and more is not wanted."""


class Rehearsal(TrainerCallback):
    """Writes a checkpoint as soon as there is an optimizer, so that one that cannot be saved is known before it counts."""

    def __init__(self, trainer: Saving) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: object,
    ) -> None:
        """Rehearse, unless a run goes on whose checkpoints have been saved before.

        Raises:
            RunError: what is read back is not what was written.
            RehearsedError: ``train.preflight_only`` is set.
        """
        train = self.trainer.run.train
        if state.global_step == 0 and (train.save_steps or train.preflight_only):
            self._rehearse()
        if train.preflight_only:
            self.trainer.accelerator.wait_for_everyone()  # the main process deletes what others may still read
            goes_on = f"goes on from step {state.global_step}"
            raise RehearsedError(goes_on if state.global_step else "written, read back and equal")

    def _rehearse(self) -> None:
        trainer = self.trainer
        trainer._save_checkpoint(trainer.model, None)
        if not trainer.accelerator.is_main_process:
            return
        written = trainer.checkpoints / STAGED / "checkpoint-0"
        fault = fault_of(written) or saved_difference(trainer.model, written)
        if fault:
            raise RunError(
                f"{trainer.checkpoints}: a checkpoint that was written before step 1 is not what is read back:"
                f" {fault}. The disk or its driver loses data; set runs_dir to another one"
            )
        shutil.rmtree(written.parent)
