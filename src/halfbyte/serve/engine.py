"""Owns the scheduling: requests to slots, slots to passes, tokens back to those who wait for them.

One thread owns the model. In each pass every running request takes part, with one token or a piece
of its prompt; a request that begins joins the next pass, one that ends makes room (iteration-level
scheduling, Orca, OSDI 2022 §3.1). What a prompt begins with is computed once: a slot that is free keeps
its tokens, and a request starts from the slot that shares most with it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from halfbyte.forward.slot_attention import SlotInput
from halfbyte.generate.slot_model import Backend
from halfbyte.heap import trim_heap
from halfbyte.serve.sampling import Choice, GrammarError, Sampler
from halfbyte.serve.text import TextStream

PROMPT_TOKENS = 512  # of prompts in one pass, so that running answers go on
TRIM_S = 30.0  # after which freed memory is given back: passes of all lengths leave holes
MIN_SHARED = 16  # tokens worth copying or waiting for
FinishReason = Literal["stop", "length", "timeout", "cancelled", "grammar", "error"]


@dataclass(frozen=True)
class Event:
    """What a request is told: text and tokens that came, or that it has ended."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish_reason: FinishReason | None = None
    told: str = ""  # why, where the reason alone does not say it


@dataclass
class Job:
    """A request for one answer.

    Attributes:
        prompt: ids, at least one.
        adapter: its name, or None for the base.
        max_tokens: longest answer.
        stop_ids: tokens that end it.
        emit: called with events in the engine's thread; must not block.
        deadline: on the monotonic clock, when the answer is cut.
    """

    prompt: list[int]
    adapter: str | None
    sampler: Sampler
    stream: TextStream
    max_tokens: int
    stop_ids: frozenset[int]
    emit: Callable[[Event], None]
    deadline: float
    cancelled: bool = False
    num_shared: int = 0
    num_generated: int = 0


@dataclass
class Slot:
    """A place in the cache: the tokens that it holds, and who uses it.

    Attributes:
        order: of its job among all that came.
        used: when it was last computed.
    """

    number: int
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    job: Job | None = None
    todo: list[int] = field(default_factory=list)
    order: int = 0
    used: float = 0.0

    def shared(self, adapter: str | None, prompt: list[int]) -> int:
        """Tokens that a prompt has in common with what is computed here, its last one not counted."""
        if adapter != self.adapter:
            return 0
        count = 0
        for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            count += 1
        return count


@dataclass
class Counts:
    """Totals since the start."""

    prompt_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
    passes: int = 0
    lanes: int = 0
    failed_passes: int = 0
    failed_answers: int = 0


class Engine:
    """Runs jobs on a backend until it is stopped.

    Args:
        backend: the model.
        max_waiting: jobs that may wait for a slot.
    """

    def __init__(self, backend: Backend, max_waiting: int) -> None:
        self.backend, self.max_waiting = backend, max_waiting
        self.counts = Counts()
        self.slots = [Slot(number) for number in range(backend.num_slots)]
        self._given_up: str | None = None
        self._placed = 0
        self._trimmed = time.monotonic()
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that is running; jobs that are left are told that they are cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, jobs: list[Job]) -> bool:
        """Queue jobs that belong together; False where there is no room for all of them."""
        with self._wake:
            if self._stopping or self.failure or len(self._waiting) + len(jobs) > self.max_waiting:
                return False
            self._waiting += jobs
            self._wake.notify()
        return True

    def cancel(self, job: Job) -> None:
        """Stop a job soon; nobody waits for it any more."""
        job.cancelled = True

    def cancel_all(self) -> None:
        """Stop every job soon; each is told."""
        with self._wake:
            for job in [*self._waiting, *(slot.job for slot in self.slots if slot.job)]:
                job.cancelled = True

    @property
    def failure(self) -> str | None:
        """Why no request can be answered any more, if that is so."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping:
            return self._given_up or "its thread has ended"
        return self._given_up

    @property
    def num_waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs with one."""
        return sum(slot.job is not None for slot in self.slots)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting or self.num_running):
                    self._wake.wait()
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception as error:  # the thread must live: later requests may do well
                if not self._recovers(error):
                    break
        with self._wake:  # nobody can come in any more
            left = [*self._waiting, *(slot.job for slot in self.slots if slot.job)]
            self._waiting.clear()
        for job in left:
            job.emit(Event(finish_reason="cancelled" if self._stopping else "error"))

    def _recovers(self, error: Exception) -> bool:
        """End what is running, as what the cache holds is not known any more; whether the model goes on."""
        self.counts.failed_passes += 1
        print(f"engine: {type(error).__name__}: {error}", flush=True)
        for slot in self.slots:
            if slot.job is not None:
                slot.job.emit(Event(finish_reason="error"))
            slot.job, slot.tokens, slot.todo = None, [], []
        try:
            # Was it that request, or is it all of them, such as where a CUDA context is lost?
            self.backend.forget()
            self.backend.run([SlotInput(0, None, [0], 0)])
            self.backend.forget()
        except Exception as second:
            with self._wake:
                self._given_up = f"{type(second).__name__}: {second}"
            print(f"engine: given up: {self._given_up}", flush=True)
        return self._given_up is None

    def _turn(self) -> None:
        """Admit, one pass, hand out."""
        self._drop()
        self._admit()
        lanes = self._lanes()
        if not lanes:
            return
        logits = self.backend.run([lane for _, lane in lanes])
        self.counts.passes += 1
        self.counts.lanes += len(lanes)
        for row, (slot, lane) in enumerate(lanes):
            slot.tokens += lane.ids
            slot.todo = slot.todo[len(lane.ids) :]
            slot.used = time.monotonic()
            if not slot.todo:
                self._hand_out(slot, logits[row])
        if time.monotonic() > self._trimmed + TRIM_S:
            trim_heap()
            self._trimmed = time.monotonic()

    def _drop(self) -> None:
        """Let go of jobs that nobody waits for, or whose time is up."""
        now = time.monotonic()
        for slot in self.slots:
            if slot.job is not None and (slot.job.cancelled or now > slot.job.deadline):
                self._end(slot, "cancelled" if slot.job.cancelled else "timeout")
        with self._wake:
            gone = [job for job in self._waiting if job.cancelled or now > job.deadline]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            job.emit(Event(finish_reason="cancelled" if job.cancelled else "timeout"))

    def _admit(self) -> None:
        """Give free slots to jobs in the order they came.

        A job waits a pass where another one is computing what both begin with. It stays in the queue
        until it has its slot, so that it is somewhere at any time.
        """
        with self._wake:
            waiting = list(self._waiting)
        for job in waiting:
            if all(slot.job is not None for slot in self.slots):
                break
            if self._is_being_computed(job):
                continue
            try:
                self._place(job)
            except Exception:
                job.emit(Event(finish_reason="error"))
                raise
            finally:
                with self._wake:
                    self._waiting.remove(job)

    def _is_being_computed(self, job: Job) -> bool:
        if not self.backend.can_copy:
            return False
        done = max(slot.shared(job.adapter, job.prompt) for slot in self.slots)
        for slot in self.slots:
            if slot.job is None or slot.adapter != job.adapter or len(slot.todo) <= 1:
                continue
            coming = Slot(-1, slot.adapter, slot.tokens + slot.todo)
            if coming.shared(job.adapter, job.prompt) >= done + MIN_SHARED:
                return True
        return False

    def _place(self, job: Job) -> None:
        free = [slot for slot in self.slots if slot.job is None]
        shared = {slot.number: slot.shared(job.adapter, job.prompt) for slot in self.slots}
        best = max(free, key=lambda slot: (shared[slot.number], -len(slot.tokens), -slot.used))
        richest = max(self.slots, key=lambda slot: shared[slot.number])
        kept = shared[best.number]
        if self.backend.can_copy and shared[richest.number] >= kept + MIN_SHARED:
            # The one that was used longest ago gives way, and what is shared stays where it is.
            best = min(free, key=lambda slot: (len(slot.tokens) > 0, slot.used))
            kept = shared[richest.number]
            self.backend.copy(richest.number, best.number, kept)
        kept = self.backend.keep(best.number, kept)
        self._placed += 1
        best.job, best.adapter, best.order = job, job.adapter, self._placed
        best.tokens, best.todo = job.prompt[:kept], job.prompt[kept:]
        job.num_shared = kept
        self.counts.prompt_tokens += len(job.prompt)
        self.counts.shared_tokens += kept

    def _lanes(self) -> list[tuple[Slot, SlotInput]]:
        """Every running answer's token, and pieces of prompts, those first that came first."""
        lanes, room = [], PROMPT_TOKENS
        running = [slot for slot in self.slots if slot.job is not None]
        for slot in sorted(running, key=lambda slot: slot.order):
            count = 1 if len(slot.todo) == 1 else min(len(slot.todo), room)
            if count:
                room -= count if count > 1 else 0
                lane = SlotInput(slot.number, slot.adapter, slot.todo[:count], len(slot.tokens))
                lanes.append((slot, lane))
        return lanes

    def _hand_out(self, slot: Slot, logits: torch.Tensor) -> None:
        """The next token of one answer; what goes wrong in it ends no other."""
        try:
            self._choose(slot, logits)
        except GrammarError as error:
            self._end(slot, "grammar", str(error))
        except Exception as error:
            self.counts.failed_answers += 1
            print(f"engine, one answer: {type(error).__name__}: {error}", flush=True)
            self._end(slot, "error")

    def _choose(self, slot: Slot, logits: torch.Tensor) -> None:
        job = slot.job
        assert job is not None
        choice = job.sampler.choose(logits)
        job.num_generated += 1
        self.counts.generated_tokens += 1
        matcher = job.sampler.matcher
        if choice.token in job.stop_ids:
            self._end(slot, "stop")
            return
        text = job.stream.push(choice.token)
        job.emit(Event(text, (choice,)))
        slot.todo = [choice.token]
        if job.stream.stopped or (matcher is not None and matcher.is_stopped()):
            self._end(slot, "stop")
        elif job.num_generated >= job.max_tokens:
            self._end(slot, "length")

    def _end(self, slot: Slot, reason: FinishReason, told: str = "") -> None:
        job = slot.job
        assert job is not None
        rest = job.stream.flush() if reason in ("stop", "length") else ""
        slot.job, slot.todo = None, []
        job.emit(Event(rest, (), reason, told))
