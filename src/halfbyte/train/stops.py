"""Owns stopping a training from outside: the step under way is finished and saved before the process ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.errors import StoppedError
from halfbyte.faults import train_command
from halfbyte.train.held_out import EvaluationCutError
from halfbyte.train.watchdog import watched

if TYPE_CHECKING:
    from halfbyte.train.session import Session
    from halfbyte.train.trainer import TokenTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def train_until_stopped(trainer: TokenTrainer, session: Session) -> None:
    """Train to the end, or to the step in which SIGTERM or SIGINT arrives.

    Raises:
        StoppedError: it was stopped; the message has the step and the command that goes on.
    """
    guard = StopGuard(trainer)
    # Before the callbacks that look whether the step is to be saved.
    trainer.callback_handler.callbacks.insert(0, guard)
    with guard.listening(), watched(trainer):
        trainer.train_to_end(session.resume)
    done = trainer.state.global_step
    if guard.stopped_by is not None:
        raise StoppedError(guard.stopped_by, done, train_command(session.folder.config))


class StopGuard(TrainerCallback):
    """Ends the training after the step in which a signal came to one of its processes, with a checkpoint.

    Attributes:
        stopped_by: number of the signal, or None.
    """

    def __init__(self, trainer: TokenTrainer) -> None:
        self.trainer, self.processes = trainer, trainer.accelerator
        self.stopped_by: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals within the ``with`` block; a second SIGINT ends the process at once."""
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Make up for the evaluation that a signal has cut short in the run that is gone on with."""
        if self.trainer.owes_evaluation:
            self.trainer.owes_evaluation = False
            self.trainer.evaluate()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save and stop if a signal came; processes that train together agree on the step."""
        stopped_by = self.stopped_by or 0
        if self.processes.num_processes > 1:
            largest = torch.tensor(stopped_by, device=self.processes.device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            stopped_by = int(largest)
        if stopped_by:
            self.stopped_by = stopped_by
            control.should_save = control.should_training_stop = True

    def _take(self, number: int, _: Any) -> None:
        if self.stopped_by is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.stopped_by = number
        self.trainer.cuts_evaluation = self.processes.num_processes == 1
        name = signal.Signals(number).name
        print(
            f"\n{name}: this step is finished and saved, then the training stops", file=sys.stderr
        )
        if self.trainer.cuts_evaluation and self.trainer.evaluates:
            raise EvaluationCutError
