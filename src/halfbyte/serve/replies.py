"""Owns answers as OpenAI words them: whole or streamed, of chats and of completions."""

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

from halfbyte.serve.engine import Event, Job
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.sampling import Choice
from halfbyte.serve.schema import Generation
from halfbyte.serve.service import Answers, Served, Service

FAULTS = {"timeout", "cancelled", "grammar", "error"}
KEEP_ALIVE_S = 15.0  # after which a stream that has nothing yet says so, lest a proxy cut it
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Form:
    """How a route words its answers.

    Attributes:
        wants_logprobs: whether tokens are told beside the text.
    """

    object = ""
    chunk = ""

    def __init__(self, model: Served, *, wants_logprobs: bool) -> None:
        self.model, self.wants_logprobs = model, wants_logprobs
        self._head = {
            "id": f"{self.object[:4]}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }

    def head(self, *, stream: bool = False) -> dict[str, Any]:
        """What every object begins with."""
        return {**self._head, "object": self.chunk if stream else self.object}

    def first(self, number: int) -> dict[str, Any] | None:
        """What the stream of an answer begins with, if anything."""
        return None

    def choice(self, number: int, made: Collected) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """A piece of one."""
        raise NotImplementedError


class Collected:
    """An answer as it comes."""

    def __init__(self) -> None:
        self.text, self.choices, self.end = "", list[Choice](), Event()

    def add(self, event: Event) -> None:
        """A piece of it."""
        self.text += event.text
        self.choices += event.choices
        self.end = event

    @property
    def finish_reason(self) -> str:
        """Why it ended."""
        return self.end.finish_reason or ""


class ChatForm(Form):
    """``chat.completion`` and its chunks."""

    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def first(self, number: int) -> dict[str, Any]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, number: int, made: Collected) -> dict[str, Any]:
        """As ``Form.choice``."""
        return {
            "index": number,
            "message": {"role": "assistant", "content": made.text},
            "logprobs": self._logprobs(made.choices),
            "finish_reason": made.finish_reason,
        }

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """As ``Form.delta``."""
        return {
            "index": number,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event.choices) if event.choices else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = [
            {
                **self._piece(choice.token, choice.logprob),
                "top_logprobs": [self._piece(*pair) for pair in choice.top],
            }
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _piece(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, content = self.model.words.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(content)}


class TextForm(Form):
    """``text_completion``."""

    object = "text_completion"
    chunk = "text_completion"

    def __init__(self, model: Served, *, wants_logprobs: bool) -> None:
        super().__init__(model, wants_logprobs=wants_logprobs)
        self._offsets: dict[int, int] = {}

    def choice(self, number: int, made: Collected) -> dict[str, Any]:
        """As ``Form.choice``."""
        return {
            "index": number,
            "text": made.text,
            "logprobs": self._logprobs(number, made.choices),
            "finish_reason": made.finish_reason,
        }

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """As ``Form.delta``."""
        return {
            "index": number,
            "text": event.text,
            "logprobs": self._logprobs(number, event.choices) if event.choices else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, number: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None

        def piece(token: int) -> str:
            return self.model.words.piece(token)[0]

        pieces = [piece(choice.token) for choice in choices]
        offsets, at = [], self._offsets.get(number, 0)
        for text in pieces:
            offsets.append(at)
            at += len(text)
        self._offsets[number] = at
        return {
            "tokens": pieces,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                {piece(token): logprob for token, logprob in choice.top} for choice in choices
            ],
            "text_offset": offsets,
        }


async def reply(
    service: Service,
    request: Request,
    asked: Generation,
    form: Form,
    submitted: tuple[list[Job], Answers],
) -> Any:
    """The whole answer, or a stream of it; jobs of a client that has gone are cancelled."""
    jobs, answers = submitted
    if asked.stream:
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        lines = _stream(service, jobs, answers, form, with_usage=usage)
        return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)
    collected = [Collected() for _ in jobs]
    gone = asyncio.create_task(_until_gone(request))
    left = len(jobs)
    try:
        while left:
            taken = asyncio.create_task(answers.get())
            await asyncio.wait({taken, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not taken.done():
                taken.cancel()
                raise RefusedError(400, "the client has gone")
            number, event = taken.result()
            collected[number].add(event)
            left -= event.finish_reason is not None
    finally:
        gone.cancel()
        _cancel(jobs)
    for one in collected:
        if one.finish_reason in FAULTS:
            raise _fault(one.end, service)

    def whole() -> Response:
        choices = [form.choice(number, one) for number, one in enumerate(collected)]
        made = {**form.head(), "choices": choices, "usage": _usage(jobs)}
        return Response(json.dumps(made), media_type="application/json")

    # Log-probabilities of long answers take seconds to word.
    return await run_in_threadpool(whole)


async def _stream(
    service: Service, jobs: list[Job], answers: Answers, form: Form, *, with_usage: bool
) -> AsyncIterator[str]:
    left = len(jobs)
    try:
        for number in range(len(jobs)):
            first = form.first(number)
            if first is not None:
                yield _line({**form.head(stream=True), "choices": [first]})
        while left:
            try:
                number, event = await asyncio.wait_for(answers.get(), KEEP_ALIVE_S)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            left -= event.finish_reason is not None
            if event.finish_reason in FAULTS:
                yield _line(_fault(event, service).body)
                return
            if event.text or event.finish_reason or (event.choices and form.wants_logprobs):
                yield _line({**form.head(stream=True), "choices": [form.delta(number, event)]})
        if with_usage:
            yield _line({**form.head(stream=True), "choices": [], "usage": _usage(jobs)})
        yield "data: [DONE]\n\n"
    finally:
        _cancel(jobs)


def _line(value: dict[str, Any]) -> str:
    # Escaped: half a character in a token's text is still valid JSON.
    return f"data: {json.dumps(value)}\n\n"


def _cancel(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancelled = True


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fault(event: Event, service: Service) -> RefusedError:
    if event.finish_reason == "timeout":
        return RefusedError(408, f"no answer within {service.limits.answer_seconds:g} s")
    if event.finish_reason == "cancelled":
        return RefusedError(503, "the server is stopping")
    if event.finish_reason == "grammar":
        return RefusedError(
            400, f"response_format: cannot be followed further: {event.told}", "response_format"
        )
    return RefusedError(503, "the model failed on this request; see the server's log")


def _usage(jobs: list[Job]) -> dict[str, Any]:
    """Tokens of a request: each prompt counts once."""
    prompts = {id(job.prompt): job for job in jobs}.values()
    prompt = sum(len(job.prompt) for job in prompts)
    generated = sum(job.num_generated for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(job.num_shared for job in prompts)},
    }
