"""Owns what the routes share: models by name, and the way from a request to jobs of an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.serve.chat_codec import Words
from halfbyte.serve.engine import Engine, Event, Job
from halfbyte.serve.limits import Limits
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.sampling import Sampler, Sampling
from halfbyte.serve.schema import ChatRequest, Generation
from halfbyte.serve.text import TextStream

CHARS_PER_TOKEN = 64  # longer texts than this are refused before they are tokenised
TOO_LONG = "context_length_exceeded"
MAX_LOGPROBS = 200_000  # that one request may be told
Answers = asyncio.Queue[tuple[int, Event]]


@dataclass(frozen=True)
class Served:
    """A model by the name that requests use.

    Attributes:
        engine: what computes it.
        words: its template and tokens.
        adapter: its name in the engine, or None for the base.
        parent: name of the base that it adapts.
    """

    name: str
    engine: Engine
    words: Words
    adapter: str | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """Models, limits, and whether new requests are taken.

    Args:
        served: in the order in which they are listed.
        limits: of every request.
    """

    def __init__(self, served: list[Served], limits: Limits) -> None:
        self.served = {one.name: one for one in served}
        self.limits = limits
        self.engines = list({id(one.engine): one.engine for one in served}.values())
        self.metrics = Metrics(self.engines)
        self.draining = False

    @property
    def is_idle(self) -> bool:
        """Whether no answer is being made or waited for."""
        # A job goes from waiting to running, so that it is looked for in this order.
        return not any(one.num_waiting or one.num_running for one in self.engines)

    def check_open(self) -> None:
        """Raises RefusedError while the server stops."""
        if self.draining:
            raise RefusedError(503, "the server is stopping")

    def need(self, name: str) -> Served:
        """The model of that name."""
        if name not in self.served:
            known = ", ".join(self.served)
            raise RefusedError(
                404,
                f"model {name[:200]!r} is not served; there are: {known}",
                "model",
                "model_not_found",
            )
        return self.served[name]

    def context(self, model: Served) -> int:
        """Tokens of a prompt and its answer, at most."""
        return model.engine.backend.max_context

    def check_size(self, num_chars: int, model: Served, param: str) -> None:
        """Refuse a text that cannot fit, before it is tokenised."""
        if num_chars > CHARS_PER_TOKEN * self.context(model):
            raise RefusedError(
                400,
                f"{num_chars} characters; at most {self.context(model)} tokens fit, and no token has so many",
                param,
                TOO_LONG,
            )

    def submit(
        self,
        asked: Generation,
        model: Served,
        prompts: list[list[int]],
        max_tokens: int | None,
        top_logprobs: int | None,
        matchers: list[Any] | None = None,
    ) -> tuple[list[Job], Answers]:
        """Queue one job for each answer; its events come with its number.

        Raises:
            RefusedError: no room in the context or the queue, or the server is stopping.
        """
        self.check_open()
        answers: Answers = asyncio.Queue()
        stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        deadline = time.monotonic() + self.limits.answer_seconds
        sampling = _sampling(asked, top_logprobs)
        jobs: list[Job] = []
        wanted = [self._room(asked, model, len(prompt), max_tokens) for prompt in prompts]
        told = sum(wanted) * (asked.n or 1) * (0 if top_logprobs is None else top_logprobs + 1)
        if told > MAX_LOGPROBS:
            raise RefusedError(
                400,
                f"up to {told} log-probabilities (tokens x answers x the likeliest ones and their own); at most"
                f" {MAX_LOGPROBS} are told. Ask for fewer max_tokens",
                "max_tokens",
            )
        first_token = self.metrics.first_token(model.name)
        for prompt, tokens in zip(prompts, wanted, strict=True):
            # A chat's answer begins a text of its own; a completion goes on with one.
            lead = () if isinstance(asked, ChatRequest) else prompt
            for _ in range(asked.n or 1):
                number = len(jobs)
                seed = None if sampling.seed is None else sampling.seed + number
                matcher = matchers[number] if matchers else None
                job = Job(
                    prompt=prompt,
                    adapter=model.adapter,
                    sampler=Sampler(replace(sampling, seed=seed), matcher),
                    stream=TextStream(model.words.decode, stops, lead),
                    max_tokens=tokens,
                    stop_ids=model.words.stop_ids,
                    emit=_sender(answers, number, first_token),
                    deadline=deadline,
                )
                jobs.append(job)
        if model.engine.failure:
            raise RefusedError(503, f"the model failed: {model.engine.failure}")
        if not model.engine.submit(jobs):
            waiting = model.engine.num_waiting
            raise RefusedError(
                429,
                f"{waiting} requests wait already, at most {self.limits.max_waiting} may; come back later",
            )
        return jobs, answers

    def _room(
        self, asked: Generation, model: Served, num_prompt: int, max_tokens: int | None
    ) -> int:
        room = self.context(model) - num_prompt
        if room < 1:
            raise RefusedError(
                400,
                f"the prompt has {num_prompt} tokens; with an answer at most {self.context(model)} fit",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                TOO_LONG,
            )
        if max_tokens is not None and max_tokens > room:
            raise RefusedError(
                400,
                f"max_tokens {max_tokens}: after {num_prompt} tokens of the prompt there is room for {room}",
                "max_tokens",
            )
        return max_tokens or room


def _sender(answers: Answers, number: int, first_token: Callable[[float], None]) -> Any:
    loop = asyncio.get_running_loop()
    start, begun = time.monotonic(), False

    def emit(event: Event) -> None:
        nonlocal begun
        if event.choices and not begun:
            begun = True
            first_token(time.monotonic() - start)
        # A loop that has closed has nobody who waits.
        if not loop.is_closed():
            loop.call_soon_threadsafe(answers.put_nowait, (number, event))

    return emit


def _sampling(asked: Generation, top_logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        top_logprobs=top_logprobs,
    )
