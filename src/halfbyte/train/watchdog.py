"""Owns the watch over the time that a step takes: one that hangs or crawls is said while it does."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.host import gib, ram_bytes

if TYPE_CHECKING:
    from halfbyte.train.trainer import TokenTrainer

LEAST_S = 60.0  # a shorter step is never late
TIMES = 20  # as long as the steps before
NUM_STEPS = 50  # that are remembered
LOOK_S = 5.0


class StepWatch(TrainerCallback):
    """Knows when the step under way began, and how long those before it took.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun: tuple[int, float] | None = None
        self.seconds: deque[float] = deque(maxlen=NUM_STEPS)
        self.said = -1  # the step that was last said to be late

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: object,
    ) -> None:
        """Take the time."""
        self.begun = (state.global_step + 1, self.clock())

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: object,
    ) -> None:
        """Remember how long the step took."""
        if self.begun is not None:
            self.seconds.append(self.clock() - self.begun[1])
        self.begun = None

    def late(self) -> str:
        """Return a warning the first time that the step under way is late, else ""."""
        begun = self.begun
        if begun is None or begun[0] == self.said or not self.seconds:
            return ""
        step, start = begun
        usual, now = statistics.median(self.seconds), self.clock() - start
        if now < max(LEAST_S, TIMES * usual):
            return ""
        self.said = step
        return (
            f"warning: step {step} has taken {now:.0f} s so far, where a step took {usual:.3g} s."
            f" {gib(ram_bytes()[1])} of memory are free. If memory is swapped or another process computes here, end that;"
            f" with several processes one may be gone. Where it is: py-spy dump --pid {os.getpid()}. SIGTERM saves"
            " the step, if it ends"
        )


@contextmanager
def watched(trainer: TokenTrainer) -> Iterator[None]:
    """Warn of late steps on standard error within the ``with`` block."""
    watch, over = StepWatch(), threading.Event()
    trainer.add_callback(watch)

    def look() -> None:
        while not over.wait(LOOK_S):
            if warning := watch.late():
                print(f"\n{warning}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
