"""Owns the scheduling: requests to slots, slots to forward passes, sampled tokens back to the requests.

One thread owns the model. Every running request takes part in each pass, with the token it sampled last
(decode) or a piece of its prompt (prefill). A new request joins the next pass, and one that ends frees its
slot (iteration-level scheduling, Orca, OSDI 2022 §3.1). Common prefixes of prompts are computed once: a free
slot keeps its KV cache, and a request starts from the slot that shares the longest prefix with it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from halfbyte.forward.slot_paths import SlotInput
from halfbyte.generate.grammar import GrammarError
from halfbyte.generate.slot_model import Backend
from halfbyte.heap import trim_heap
from halfbyte.serve.jobs import Event, FinishReason, Job
from halfbyte.serve.sampling import scored_tokens

PREFILL_TOKENS = 512  # in one pass, so that running answers do not stall
SCORED_TOKENS = 64  # of a prompt in one pass, as each of them has logits of the whole vocabulary
TRIM_S = 30.0  # between returns of freed memory to the system: passes of many lengths leave holes
MIN_SHARED = 16  # tokens of a common prefix worth copying or waiting for


@dataclass
class Slot:
    """A slot of the KV cache.

    Attributes:
        tokens: the tokens whose keys and values it holds.
        job: the job that uses it, or None if it is free.
        pending: tokens of the job that are not computed yet.
        order: the number of its job in the order in which jobs got a slot.
        last_used: when it last took part in a pass.
    """

    number: int
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    job: Job | None = None
    pending: list[int] = field(default_factory=list)
    order: int = 0
    last_used: float = 0.0

    def shared_prefix(self, adapter: str | None, prompt: list[int]) -> int:
        """Return how many tokens of a prompt, except its last one, are in the slot already."""
        if adapter != self.adapter:
            return 0
        count = 0
        for cached, token in zip(self.tokens, prompt[:-1], strict=False):
            if cached != token:
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
    slot_inputs: int = 0
    failed_passes: int = 0
    failed_answers: int = 0


class Engine:
    """Run jobs on a backend until the engine is stopped.

    Args:
        backend: the model.
        max_waiting: number of jobs that may wait for a slot.
    """

    def __init__(self, backend: Backend, max_waiting: int) -> None:
        self.backend, self.max_waiting = backend, max_waiting
        self.counts = Counts()
        self.slots = [Slot(number) for number in range(backend.num_slots)]
        self._fatal_error: str | None = None
        self._num_placed = 0
        self._last_trim = time.monotonic()
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current pass; remaining jobs get an event that says they are cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, jobs: list[Job]) -> bool:
        """Queue jobs that belong together, or return False if there is no room for all of them."""
        with self._wake:
            if self._stopping or self.failure or len(self._waiting) + len(jobs) > self.max_waiting:
                return False
            self._waiting += jobs
            self._wake.notify()
        return True

    def cancel(self, job: Job) -> None:
        """Stop a job soon, as nobody waits for it any more."""
        job.cancelled = True

    def cancel_all(self) -> None:
        """Stop every job soon; each gets an event that says so."""
        with self._wake:
            for job in [*self._waiting, *(slot.job for slot in self.slots if slot.job)]:
                job.cancelled = True

    @property
    def failure(self) -> str | None:
        """Why no request can be answered any more, or None."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping:
            return self._fatal_error or "its thread has ended"
        return self._fatal_error

    @property
    def num_waiting(self) -> int:
        """The number of jobs that wait for a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """The number of jobs that have a slot."""
        return sum(slot.job is not None for slot in self.slots)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting or self.num_running):
                    self._wake.wait()
                if self._stopping:
                    break
            try:
                self._step()
            except Exception as error:  # the thread must survive: later requests may succeed
                if not self._recover(error):
                    break
        with self._wake:  # no job can be added any more
            remaining = [*self._waiting, *(slot.job for slot in self.slots if slot.job)]
            self._waiting.clear()
        for job in remaining:
            job.emit(Event(finish_reason="cancelled" if self._stopping else "error"))

    def _recover(self, error: Exception) -> bool:
        """End all running jobs, as the KV cache may be corrupt, and return whether the model still works."""
        self.counts.failed_passes += 1
        print(f"engine: {type(error).__name__}: {error}", flush=True)
        for slot in self.slots:
            if slot.job is not None:
                slot.job.emit(Event(finish_reason="error"))
            slot.job, slot.tokens, slot.pending = None, [], []
        try:
            # Did that request alone fail, or do all of them, as after the loss of a CUDA context?
            self.backend.forget()
            self.backend.run([SlotInput(0, None, [0], 0)])
            self.backend.forget()
        except Exception as second:
            with self._wake:
                self._fatal_error = f"{type(second).__name__}: {second}"
            print(f"engine: giving up: {self._fatal_error}", flush=True)
        return self._fatal_error is None

    def _step(self) -> None:
        """Admit waiting jobs, run one pass, and deliver the sampled tokens."""
        self._drop_ended()
        self._admit()
        scheduled = self._schedule()
        if not scheduled:
            return
        logits = self.backend.run([slot_input for _, slot_input in scheduled])
        self.counts.passes += 1
        self.counts.slot_inputs += len(scheduled)
        row = -1
        for slot, slot_input in scheduled:
            row += slot_input.num_logits  # of its last token
            if slot.job is not None and slot.job.scores_prompt is not None:
                rows = logits[row + 1 - slot_input.num_logits : row + 1]
                _score_prompt(slot.job, rows, slot_input.start)
            slot.tokens += slot_input.ids
            slot.pending = slot.pending[len(slot_input.ids) :]
            slot.last_used = time.monotonic()
            if not slot.pending:
                self._deliver(slot, logits[row])
        if time.monotonic() > self._last_trim + TRIM_S:
            trim_heap()
            self._last_trim = time.monotonic()

    def _drop_ended(self) -> None:
        """End jobs that were cancelled or whose deadline has passed."""
        now = time.monotonic()
        for slot in self.slots:
            if slot.job is not None and (slot.job.cancelled or now > slot.job.deadline):
                self._finish(slot, "cancelled" if slot.job.cancelled else "timeout")
        with self._wake:
            ended = [job for job in self._waiting if job.cancelled or now > job.deadline]
            for job in ended:
                self._waiting.remove(job)
        for job in ended:
            job.emit(Event(finish_reason="cancelled" if job.cancelled else "timeout"))

    def _admit(self) -> None:
        """Give free slots to jobs in the order in which they arrived.

        A job waits for a pass while another one is computing a prefix that both share. It stays in the
        queue until it has its slot, so that it can be found in one of the two at any time.
        """
        with self._wake:
            waiting = list(self._waiting)
        for job in waiting:
            if all(slot.job is not None for slot in self.slots):
                break
            if job.scores_prompt is None and self._prefix_is_pending(job):
                continue
            try:
                self._place(job)
            except Exception:
                job.emit(Event(finish_reason="error"))
                raise
            finally:
                with self._wake:
                    self._waiting.remove(job)

    def _prefix_is_pending(self, job: Job) -> bool:
        """Return whether another job is computing a longer prefix of this job's prompt than any slot holds."""
        if not self.backend.can_copy:
            return False
        computed = max(slot.shared_prefix(job.adapter, job.prompt) for slot in self.slots)
        for slot in self.slots:
            if slot.job is None or slot.adapter != job.adapter or len(slot.pending) <= 1:
                continue
            after_prefill = Slot(-1, slot.adapter, slot.tokens + slot.pending)
            if after_prefill.shared_prefix(job.adapter, job.prompt) >= computed + MIN_SHARED:
                return True
        return False

    def _place(self, job: Job) -> None:
        """Choose a free slot for a job, and copy the prefix from another slot if that one holds more of it."""
        free = [slot for slot in self.slots if slot.job is None]
        shared = {slot.number: slot.shared_prefix(job.adapter, job.prompt) for slot in self.slots}
        target = max(
            free, key=lambda slot: (shared[slot.number], -len(slot.tokens), -slot.last_used)
        )
        source = max(self.slots, key=lambda slot: shared[slot.number])
        kept = shared[target.number]
        if self.backend.can_copy and shared[source.number] >= kept + MIN_SHARED:
            # Overwrite an empty slot or the least recently used one, so that the shared prefix stays cached.
            target = min(free, key=lambda slot: (len(slot.tokens) > 0, slot.last_used))
            kept = shared[source.number]
            self.backend.copy(source.number, target.number, kept)
        # What is scored has to be computed again.
        kept = self.backend.keep(target.number, kept if job.scores_prompt is None else 0)
        self._num_placed += 1
        target.job, target.adapter, target.order = job, job.adapter, self._num_placed
        target.tokens, target.pending = job.prompt[:kept], job.prompt[kept:]
        job.num_shared = kept
        self.counts.prompt_tokens += len(job.prompt)
        self.counts.shared_tokens += kept

    def _schedule(self) -> list[tuple[Slot, SlotInput]]:
        """Return the next pass: each running answer's last token, and pieces of prompts, oldest jobs first."""
        scheduled, prefill_room = [], PREFILL_TOKENS
        running = [slot for slot in self.slots if slot.job is not None]
        for slot in sorted(running, key=lambda slot: slot.order):
            count = 1 if len(slot.pending) == 1 else min(len(slot.pending), prefill_room)
            scored = slot.job is not None and slot.job.scores_prompt is not None
            if scored and count > 1:
                count = min(count, SCORED_TOKENS)
            if count:
                prefill_room -= count if count > 1 else 0
                ids, start = slot.pending[:count], len(slot.tokens)
                num_logits = count if scored else 1
                scheduled.append(
                    (slot, SlotInput(slot.number, slot.adapter, ids, start, num_logits))
                )
        return scheduled

    def _deliver(self, slot: Slot, logits: torch.Tensor) -> None:
        """Sample and emit the next token of one answer; an error in it ends no other answer."""
        try:
            self._sample(slot, logits)
        except GrammarError as error:
            self._finish(slot, "grammar", str(error))
        except Exception as error:
            self.counts.failed_answers += 1
            print(f"engine: one answer failed: {type(error).__name__}: {error}", flush=True)
            self._finish(slot, "error")

    def _sample(self, slot: Slot, logits: torch.Tensor) -> None:
        job = slot.job
        assert job is not None
        if job.max_tokens == 0:  # the prompt alone is scored
            self._finish(slot, "length")
            return
        sampled = job.sampler.sample(logits)
        job.num_generated += 1
        self.counts.generated_tokens += 1
        matcher = job.sampler.matcher
        if sampled.token in job.stop_ids:
            self._finish(slot, "stop")
            return
        text = job.stream.push(sampled.token)
        job.emit(Event(text, (sampled,)))
        slot.pending = [sampled.token]
        if job.stream.stopped or (matcher is not None and matcher.is_stopped()):
            self._finish(slot, "stop")
        elif job.num_generated >= job.max_tokens:
            self._finish(slot, "length")

    def _finish(self, slot: Slot, reason: FinishReason, detail: str = "") -> None:
        job = slot.job
        assert job is not None
        rest = job.stream.flush() if reason in ("stop", "length") else ""
        slot.job, slot.pending = None, []
        job.emit(Event(rest, (), reason, detail))


def _score_prompt(job: Job, logits: torch.Tensor, start: int) -> None:
    """Score the tokens of a prompt that follow those of a pass.

    Args:
        job: wants its prompt scored.
        logits: (N, V), those after the tokens from number ``start`` of the prompt on.
        start: see ``logits``.
    """
    following = job.prompt[start + 1 : start + 1 + len(logits)]
    if following:
        scored = scored_tokens(logits[: len(following)], following, job.scores_prompt or 0)
        job.prompt_tokens += scored
