"""Owns replies in OpenAI's format: whole or streamed, for chats and for completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.sampling import SampledToken
from halfbyte.serve.schema import GenerationRequest
from halfbyte.serve.service import EventQueue, ServedModel, Service

FAILURES = {"timeout", "cancelled", "grammar", "error"}
KEEP_ALIVE_S = 15.0  # a stream without events sends a comment this often, lest a proxy cut it
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ReplyBuilder:
    """Build the objects of a reply in the format of one route.

    Attributes:
        wants_logprobs: whether the reply includes log-probabilities of the tokens.
    """

    object = ""
    chunk = ""

    def __init__(self, model: ServedModel, *, wants_logprobs: bool) -> None:
        self.model, self.wants_logprobs = model, wants_logprobs
        self._head = {
            "id": f"{self.object[:4]}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }

    def head(self, *, stream: bool = False) -> dict[str, Any]:
        """Return the fields that all objects of the reply share."""
        return {**self._head, "object": self.chunk if stream else self.object}

    def first_delta(self, number: int) -> dict[str, Any] | None:
        """Return the choice that begins the stream of an answer, or None."""
        return None

    def choice(self, number: int, answer: CollectedAnswer) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        raise NotImplementedError

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """Return the choice of one chunk of a stream."""
        raise NotImplementedError


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


class ChatReplyBuilder(ReplyBuilder):
    """Build ``chat.completion`` objects and their chunks."""

    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def first_delta(self, number: int) -> dict[str, Any]:
        """Return the choice with the role, as ``ReplyBuilder.first_delta``."""
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, number: int, answer: CollectedAnswer) -> dict[str, Any]:
        """As ``ReplyBuilder.choice``."""
        return {
            "index": number,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """As ``ReplyBuilder.delta``."""
        return {
            "index": number,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event.tokens) if event.tokens else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = [
            {
                **self._token_object(sampled.token, sampled.logprob),
                "top_logprobs": [self._token_object(*pair) for pair in sampled.top],
            }
            for sampled in tokens
        ]
        return {"content": content, "refusal": None}

    def _token_object(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, content = self.model.codec.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(content)}


class CompletionReplyBuilder(ReplyBuilder):
    """Build ``text_completion`` objects."""

    object = "text_completion"
    chunk = "text_completion"

    def __init__(self, model: ServedModel, *, wants_logprobs: bool) -> None:
        super().__init__(model, wants_logprobs=wants_logprobs)
        self._offsets: dict[int, int] = {}  # number of an answer -> characters so far

    def choice(self, number: int, answer: CollectedAnswer) -> dict[str, Any]:
        """As ``ReplyBuilder.choice``."""
        return {
            "index": number,
            "text": answer.text,
            "logprobs": self._logprobs(number, answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """As ``ReplyBuilder.delta``."""
        return {
            "index": number,
            "text": event.text,
            "logprobs": self._logprobs(number, event.tokens) if event.tokens else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, number: int, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None

        def piece(token: int) -> str:
            return self.model.codec.piece(token)[0]

        pieces = [piece(sampled.token) for sampled in tokens]
        offsets, offset = [], self._offsets.get(number, 0)
        for text in pieces:
            offsets.append(offset)
            offset += len(text)
        self._offsets[number] = offset
        return {
            "tokens": pieces,
            "token_logprobs": [sampled.logprob for sampled in tokens],
            "top_logprobs": [
                {piece(token): logprob for token, logprob in sampled.top} for sampled in tokens
            ],
            "text_offset": offsets,
        }


async def reply(
    service: Service,
    request: Request,
    body: GenerationRequest,
    builder: ReplyBuilder,
    submitted: tuple[list[Job], EventQueue],
) -> Any:
    """Return the whole reply or a stream of it; cancel the jobs if the client disconnects."""
    jobs, events = submitted
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _stream(service, jobs, events, builder, with_usage=with_usage)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
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
        choices = [builder.choice(number, answer) for number, answer in enumerate(answers)]
        content = {**builder.head(), "choices": choices, "usage": _usage(jobs)}
        return Response(json.dumps(content), media_type="application/json")

    # Formatting the log-probabilities of long answers takes seconds.
    return await run_in_threadpool(build)


async def _stream(
    service: Service,
    jobs: list[Job],
    events: EventQueue,
    builder: ReplyBuilder,
    *,
    with_usage: bool,
) -> AsyncIterator[str]:
    num_unfinished = len(jobs)
    try:
        for number in range(len(jobs)):
            first = builder.first_delta(number)
            if first is not None:
                yield _sse_data({**builder.head(stream=True), "choices": [first]})
        while num_unfinished:
            try:
                number, event = await asyncio.wait_for(events.get(), KEEP_ALIVE_S)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            num_unfinished -= event.finish_reason is not None
            if event.finish_reason in FAILURES:
                yield _sse_data(_failure_error(event, service).body)
                return
            if event.text or event.finish_reason or (event.tokens and builder.wants_logprobs):
                delta = builder.delta(number, event)
                yield _sse_data({**builder.head(stream=True), "choices": [delta]})
        if with_usage:
            yield _sse_data({**builder.head(stream=True), "choices": [], "usage": _usage(jobs)})
        yield "data: [DONE]\n\n"
    finally:
        _cancel(jobs)


def _sse_data(value: dict[str, Any]) -> str:
    # json.dumps escapes non-ASCII, so half a character in a token's text is still valid JSON.
    return f"data: {json.dumps(value)}\n\n"


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
            f"response_format: cannot be followed any further: {event.detail}",
            "response_format",
        )
    return RefusedError(503, "the model failed on this request; see the server log")


def _usage(jobs: list[Job]) -> dict[str, Any]:
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
