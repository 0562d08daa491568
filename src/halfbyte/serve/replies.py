"""Owns the delivery of replies: whole or streamed, whatever their format, until the client disconnects."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.sampling import SampledToken
from halfbyte.serve.service import EventQueue, ServedModel, Service

FAILURES = {"timeout", "cancelled", "grammar", "error"}
KEEP_ALIVE_S = 15.0  # a stream without events sends a comment this often, lest a proxy cut it
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class CollectedAnswer:
    """An answer that is put together from its events."""

    def __init__(self) -> None:
        self.text, self.tokens, self.last_event = "", list[SampledToken](), Event()

    def add(self, event: Event) -> None:
        """Append the text and tokens of an event."""
        self.text += event.text
        self.tokens += event.tokens
        self.last_event = event

    @property
    def finish_reason(self) -> str:
        """Why the answer ended, or an empty string before it has."""
        return self.last_event.finish_reason or ""


class ReplyBuilder:
    """Build the replies of one route.

    Args:
        model: that answers.
        prefix: of the reply's id.
    """

    def __init__(self, model: ServedModel, prefix: str) -> None:
        self.model = model
        self.id, self.created = f"{prefix}{uuid.uuid4().hex}", int(time.time())

    def whole(self, answers: Sequence[CollectedAnswer], jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the reply of a request that is not streamed."""
        raise NotImplementedError

    def opening(self, jobs: Sequence[Job]) -> list[str]:
        """Return what a stream begins with, each as ``sse`` gives it."""
        return []

    def event(self, number: int, event: Event) -> list[str]:
        """Return what an event of an answer adds to the stream."""
        raise NotImplementedError

    def closing(self, jobs: Sequence[Job]) -> list[str]:
        """Return what a stream ends with."""
        raise NotImplementedError

    def failure(self, error: RefusedError) -> list[str]:
        """Return what a stream ends with if an answer fails."""
        return [sse(error.body)]


class ChoicesBuilder(ReplyBuilder):
    """Build replies that consist of choices, as of chats and completions.

    Attributes:
        wants_logprobs: whether the reply includes log-probabilities of the tokens.
        with_usage: whether a stream ends with the usage.
    """

    object = ""
    chunk = ""

    def __init__(self, model: ServedModel, *, wants_logprobs: bool, with_usage: bool) -> None:
        super().__init__(model, f"{self.object[:4]}-")
        self.wants_logprobs, self.with_usage = wants_logprobs, with_usage

    def choice(self, number: int, answer: CollectedAnswer) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        raise NotImplementedError

    def delta(self, number: int, event: Event) -> dict[str, Any] | None:
        """Return the choice of one chunk of a stream, or None if the event adds nothing."""
        raise NotImplementedError

    def head(self, *, stream: bool = False) -> dict[str, Any]:
        """Return the fields that all objects of the reply share."""
        kind = self.chunk if stream else self.object
        return {"id": self.id, "created": self.created, "model": self.model.name, "object": kind}

    def whole(self, answers: Sequence[CollectedAnswer], jobs: Sequence[Job]) -> dict[str, Any]:
        """As ``ReplyBuilder.whole``."""
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        return {**self.head(), "choices": choices, "usage": usage(jobs)}

    def event(self, number: int, event: Event) -> list[str]:
        """As ``ReplyBuilder.event``."""
        delta = self.delta(number, event)
        return [] if delta is None else [sse({**self.head(stream=True), "choices": [delta]})]

    def closing(self, jobs: Sequence[Job]) -> list[str]:
        """As ``ReplyBuilder.closing``."""
        end = []
        if self.with_usage:
            end = [sse({**self.head(stream=True), "choices": [], "usage": usage(jobs)})]
        return [*end, "data: [DONE]\n\n"]


async def reply(
    service: Service,
    request: Request,
    builder: ReplyBuilder,
    submitted: tuple[list[Job], EventQueue],
    *,
    stream: bool,
    headers: Mapping[str, str],
) -> Any:
    """Return the whole reply or a stream of it; cancel the jobs if the client disconnects."""
    jobs, events = submitted
    if stream:
        chunks = _stream(service, jobs, events, builder)
        return StreamingResponse(
            chunks, media_type="text/event-stream", headers={**STREAM_HEADERS, **headers}
        )
    answers = [CollectedAnswer() for _ in jobs]
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    num_unfinished = len(jobs)
    try:
        while num_unfinished:
            next_event = asyncio.create_task(events.get())
            await asyncio.wait({next_event, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not next_event.done():
                next_event.cancel()
                raise RefusedError(400, "the client disconnected")
            number, event = next_event.result()
            answers[number].add(event)
            num_unfinished -= event.finish_reason is not None
    finally:
        disconnect.cancel()
        _cancel(jobs)
    for answer in answers:
        if answer.finish_reason in FAILURES:
            raise _failure_error(answer.last_event, service)

    def build() -> Response:
        content = json.dumps(builder.whole(answers, jobs))
        return Response(content, media_type="application/json", headers=dict(headers))

    # Formatting the log-probabilities of long answers takes seconds.
    return await run_in_threadpool(build)


async def _stream(
    service: Service, jobs: list[Job], events: EventQueue, builder: ReplyBuilder
) -> AsyncIterator[str]:
    num_unfinished = len(jobs)
    try:
        for text in builder.opening(jobs):
            yield text
        while num_unfinished:
            try:
                number, event = await asyncio.wait_for(events.get(), KEEP_ALIVE_S)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            num_unfinished -= event.finish_reason is not None
            if event.finish_reason in FAILURES:
                for text in builder.failure(_failure_error(event, service)):
                    yield text
                return
            for text in builder.event(number, event):
                yield text
        for text in builder.closing(jobs):
            yield text
    finally:
        _cancel(jobs)


def sse(value: dict[str, Any], event: str = "") -> str:
    """Return a server-sent event with an object as its data."""
    # json.dumps escapes non-ASCII, so half a character in a token's text is still valid JSON.
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(value)}\n\n"


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the number of tokens of a request, with each prompt counted once."""
    jobs_by_prompt = {id(job.prompt): job for job in jobs}.values()
    num_prompt_tokens = sum(len(job.prompt) for job in jobs_by_prompt)
    num_generated = sum(job.num_generated for job in jobs)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(job.num_shared for job in jobs_by_prompt)},
    }


def _cancel(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancelled = True


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure_error(event: Event, service: Service) -> RefusedError:
    if event.finish_reason == "timeout":
        return RefusedError(408, f"no answer within {service.limits.answer_seconds:g} s")
    if event.finish_reason == "cancelled":
        return RefusedError(503, "the server is stopping")
    if event.finish_reason == "grammar":
        return RefusedError(
            400,
            f"the grammar of response_format or tools cannot be followed any further: {event.detail}",
            "response_format",
        )
    return RefusedError(503, "the model failed on this request; see the server log")
