"""Owns the interface: OpenAI's routes over an engine, with errors as OpenAI words them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from halfbyte.data.rows import Message
from halfbyte.errors import DataError
from halfbyte.serve import page
from halfbyte.serve.engine import Engine, Event, Job
from halfbyte.serve.limits import Limits
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.sampling import Choice, Sampler, Sampling
from halfbyte.serve.schema import (
    ChatReply,
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    Generation,
    ModelCard,
    ModelList,
    TextReply,
)
from halfbyte.serve.text import TextStream
from halfbyte.serve.words import Words

CHARS_PER_TOKEN = 64  # longer texts than this are refused before they are tokenised
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply, "description": what}
    for code, what in {
        400: "the request is wrong",
        401: "no API key, or a wrong one",
        404: "no such model or route",
        408: "the body came too slowly, or the answer took too long",
        413: "the body is too large",
        415: "the body is not application/json",
        429: "too many requests wait already",
        503: "the server is stopping, or the model failed",
    }.items()
}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Served:
    """A model by the name that requests use.

    Attributes:
        adapter: its name in the engine, or None for the base.
        parent: name of the base that it adapts.
    """

    name: str
    words: Words
    adapter: str | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class Refusal(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


class Server:
    """What the routes share.

    Args:
        engine: runs the jobs.
        served: models by name; the first one is the base.
        limits: of every request.
    """

    def __init__(self, engine: Engine, served: list[Served], limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.served = {one.name: one for one in served}
        self.metrics = Metrics(engine)
        self.draining = False
        self.max_context = min(limits.max_context, engine.backend.max_context)

    def need_model(self, name: str) -> Served:
        """The model of that name."""
        if name not in self.served:
            known = ", ".join(self.served)
            raise Refusal(404, f"model {name[:200]!r} is not served; there are: {known}", "model")
        return self.served[name]

    def jobs(
        self,
        asked: Generation,
        model: Served,
        prompts: list[list[int]],
        sampling: Sampling,
        max_tokens: int | None,
        answers: asyncio.Queue[tuple[int, Event]],
        matchers: list[Any] | None = None,
    ) -> list[Job]:
        """One job for each answer; its events go to the queue with its number."""
        loop = asyncio.get_running_loop()
        stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        deadline = time.monotonic() + self.limits.answer_seconds
        made = []
        for prompt in prompts:
            room = self.max_context - len(prompt)
            if room < 1:
                raise Refusal(
                    400,
                    f"the prompt has {len(prompt)} tokens; with an answer at most {self.max_context} fit",
                    "messages" if isinstance(asked, ChatRequest) else "prompt",
                )
            if max_tokens is not None and max_tokens > room:
                raise Refusal(
                    400,
                    f"max_tokens {max_tokens}: after {len(prompt)} tokens of the prompt there is room for"
                    f" {room}",
                    "max_tokens",
                )
            wanted = min(max_tokens or self.limits.default_tokens, room)
            for _ in range(asked.n or 1):
                number = len(made)
                seed = None if sampling.seed is None else sampling.seed + number
                settings = Sampling(**{**sampling.__dict__, "seed": seed})

                def emit(event: Event, number: int = number) -> None:
                    # A loop that has closed has nobody who waits.
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(answers.put_nowait, (number, event))

                made.append(
                    Job(
                        prompt,
                        model.adapter,
                        Sampler(settings, matchers[number] if matchers else None),
                        TextStream(model.words.decode, stops),
                        wanted,
                        model.words.stop_ids,
                        emit,
                        deadline,
                    )
                )
        return made

    def submit(self, jobs: list[Job]) -> None:
        """Queue them, or refuse."""
        if self.draining:
            raise Refusal(503, "the server is stopping")
        if self.engine.failure:
            raise Refusal(503, f"the model failed: {self.engine.failure}")
        if not self.engine.submit(jobs):
            raise Refusal(429, f"{self.engine.num_waiting} requests wait already; come back later")


def sampling_of(asked: Generation, top_logprobs: int | None) -> Sampling:
    """A request's settings."""
    return Sampling(
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        top_logprobs=top_logprobs,
    )


def make_app(server: Server) -> FastAPI:
    """The routes. Limits of connections, bodies and keys are ``limits.guard``'s."""
    app = FastAPI(title="halfbyte", docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.server = server

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return error_reply(error.status, error.message, error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])[:200]
        return error_reply(400, f"{place or 'body'}: {first['msg']}", place or None)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return error_reply(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(DataError)
    async def wrong_data(request: Request, error: DataError) -> JSONResponse:
        return error_reply(400, str(error))

    @app.get("/health", response_class=PlainTextResponse, tags=["state"])
    async def health() -> str:
        return "ok"

    @app.get("/ready", response_class=PlainTextResponse, tags=["state"])
    async def ready() -> str:
        if server.draining or server.engine.failure:
            raise Refusal(503, "stopping" if server.draining else str(server.engine.failure))
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse, tags=["state"])
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.metrics.text(), media_type=server.metrics.media_type)

    @app.get("/", response_class=HTMLResponse, tags=["page"])
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    @app.get("/v1/models", tags=["openai"])
    async def models() -> ModelList:
        return ModelList(data=[_card(one) for one in server.served.values()])

    @app.get("/v1/models/{name:path}", tags=["openai"])
    async def model(name: str) -> ModelCard:
        return _card(server.need_model(name))

    @app.post("/v1/chat/completions", tags=["openai"], response_model=ChatReply)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        model = server.need_model(asked.model)
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise Refusal(400, "max_tokens and max_completion_tokens are one; give one", "max_tokens")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        _check_size(sum(len(_text(one)) for one in asked.messages), server.max_context, "messages")
        turns = tuple(Message(one.role, _text(one)) for one in asked.messages)
        ids = await run_in_threadpool(model.words.chat, turns)
        schema = _schema(asked)
        count = asked.n or 1
        matchers = None
        if schema is not None:
            matchers = [
                await run_in_threadpool(model.words.matcher, schema) for _ in range(count)
            ]
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        max_tokens = asked.max_tokens or asked.max_completion_tokens
        sampling = sampling_of(asked, top)
        jobs = server.jobs(asked, model, [ids], sampling, max_tokens, queue, matchers)
        server.submit(jobs)
        return await _reply(server, request, asked, jobs, queue, _Chat(model, asked, top))

    @app.post("/v1/completions", tags=["openai"], response_model=TextReply)
    async def complete(asked: CompletionRequest, request: Request) -> Any:
        model = server.need_model(asked.model)
        prompts = await run_in_threadpool(_prompts, asked, model, server)
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        sampling = sampling_of(asked, asked.logprobs)
        jobs = server.jobs(asked, model, prompts, sampling, asked.max_tokens, queue)
        server.submit(jobs)
        return await _reply(server, request, asked, jobs, queue, _Text(model, asked))

    return app


def error_reply(
    status: int, message: str, param: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"message": message, "type": kind, "param": param, "code": None}
    extra = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse({"error": body}, status, headers={**extra, **dict(headers or {})})


async def _reply(
    server: Server,
    request: Request,
    asked: Generation,
    jobs: list[Job],
    queue: asyncio.Queue[tuple[int, Event]],
    form: _Form,
) -> Any:
    """The whole answer, or a stream of it; jobs of a client that has gone are cancelled."""
    if asked.stream:
        options = asked.stream_options
        usage = bool(options and options.include_usage)
        lines = _stream(server, jobs, queue, form, with_usage=usage)
        return StreamingResponse(lines, media_type="text/event-stream")
    if asked.stream_options is not None:
        _cancel(server, jobs)
        raise Refusal(400, "stream_options needs stream to be true", "stream_options")
    watch = asyncio.create_task(_until_gone(request))
    collected = [_Collected() for _ in jobs]
    left = len(jobs)
    try:
        while left:
            take = asyncio.create_task(queue.get())
            await asyncio.wait({take, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not take.done():
                take.cancel()
                raise Refusal(400, "the client has gone")
            number, event = take.result()
            collected[number].add(event)
            left -= event.finish_reason is not None
    finally:
        watch.cancel()
        _cancel(server, jobs)
    for one in collected:
        _check_reason(one.finish_reason, server)
    choices = [form.choice(number, one) for number, one in enumerate(collected)]
    return {**form.head(), "choices": choices, "usage": _usage(jobs, form)}


async def _stream(
    server: Server,
    jobs: list[Job],
    queue: asyncio.Queue[tuple[int, Event]],
    form: _Form,
    *,
    with_usage: bool,
) -> AsyncIterator[str]:
    left = len(jobs)
    try:
        for number in range(len(jobs)):
            first = form.first(number)
            if first is not None:
                yield _line({**form.head(stream=True), "choices": [first]})
        while left:
            number, event = await queue.get()
            left -= event.finish_reason is not None
            if event.finish_reason in ("cancelled", "error", "timeout"):
                status, message = _fault(event.finish_reason, server)
                yield _line({"error": {"message": message, "type": "server_error", "code": status}})
                return
            if event.text or event.choices or event.finish_reason:
                yield _line(
                    {**form.head(stream=True), "choices": [form.delta(number, event)]}
                )
        if with_usage:
            yield _line({**form.head(stream=True), "choices": [], "usage": _usage(jobs, form)})
        yield "data: [DONE]\n\n"
    finally:
        _cancel(server, jobs)


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _cancel(server: Server, jobs: list[Job]) -> None:
    for job in jobs:
        server.engine.cancel(job)


async def _until_gone(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def _check_reason(reason: str, server: Server) -> None:
    if reason in ("cancelled", "error", "timeout"):
        raise Refusal(*_fault(reason, server))


def _fault(reason: str, server: Server) -> tuple[int, str]:
    return {
        "timeout": (408, f"no answer within {server.limits.answer_seconds:g} s"),
        "cancelled": (503, "the server is stopping"),
        "error": (503, "the model failed on this request; see the server's log"),
    }[reason]


class _Collected:
    """An answer as it comes."""

    def __init__(self) -> None:
        self.text, self.choices, self.finish_reason = "", list[Choice](), ""

    def add(self, event: Event) -> None:
        self.text += event.text
        self.choices += event.choices
        self.finish_reason = event.finish_reason or ""


class _Form:
    """How a route words its answers."""

    object = ""

    def __init__(self, model: Served, asked: Generation) -> None:
        self.model, self.asked = model, asked
        self.id = f"{self.object[:4]}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, *, stream: bool = False) -> dict[str, Any]:
        """What every object begins with."""
        kind = f"{self.object}.chunk" if stream and self.object.startswith("chat") else self.object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def first(self, number: int) -> dict[str, Any] | None:
        """What a stream begins with, if anything."""
        return None

    def choice(self, number: int, made: _Collected) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """A piece of one."""
        raise NotImplementedError


class _Chat(_Form):
    object = "chat.completion"

    def __init__(self, model: Served, asked: Generation, top: int | None) -> None:
        super().__init__(model, asked)
        self.top = top

    def first(self, number: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, number: int, made: _Collected) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": made.text},
            "logprobs": self._logprobs(made.choices),
            "finish_reason": made.finish_reason,
        }

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event.choices) if event.choices else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, choices: list[Choice] | tuple[Choice, ...]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return {
            "content": [
                {
                    **self._piece(choice.token, choice.logprob),
                    "top_logprobs": [self._piece(*pair) for pair in choice.top],
                }
                for choice in choices
            ],
            "refusal": None,
        }

    def _piece(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, content = self.model.words.piece(token)
        return {"token": text, "logprob": logprob, "bytes": content}


class _Text(_Form):
    object = "text_completion"

    def __init__(self, model: Served, asked: CompletionRequest) -> None:
        super().__init__(model, asked)
        self.wanted = asked.logprobs is not None
        self._offsets: dict[int, int] = {}

    def choice(self, number: int, made: _Collected) -> dict[str, Any]:
        return {
            "index": number,
            "text": made.text,
            "logprobs": self._logprobs(number, made.choices),
            "finish_reason": made.finish_reason,
        }

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        return {
            "index": number,
            "text": event.text,
            "logprobs": self._logprobs(number, event.choices) if event.choices else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(
        self, number: int, choices: list[Choice] | tuple[Choice, ...]
    ) -> dict[str, Any] | None:
        if not self.wanted:
            return None
        piece = self.model.words.piece
        pieces = [piece(choice.token)[0] for choice in choices]
        offsets = []
        at = self._offsets.get(number, 0)
        for text in pieces:
            offsets.append(at)
            at += len(text)
        self._offsets[number] = at
        return {
            "tokens": pieces,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                {piece(token)[0]: logprob for token, logprob in choice.top} for choice in choices
            ],
            "text_offset": offsets,
        }


def _card(one: Served) -> ModelCard:
    return ModelCard(id=one.name, created=one.created, owned_by="halfbyte", parent=one.parent)


def _text(message: Any) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _check_size(num_chars: int, max_context: int, param: str) -> None:
    if num_chars > CHARS_PER_TOKEN * max_context:
        raise Refusal(
            400,
            f"{num_chars} characters; at most {max_context} tokens fit, and no token has so many",
            param,
        )


def _schema(asked: ChatRequest) -> dict[str, Any] | None:
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.json_schema is None:
        raise Refusal(400, "json_schema.schema is needed", "response_format")
    return wanted.json_schema.json_schema


def _prompts(asked: CompletionRequest, model: Served, server: Server) -> list[list[int]]:
    """Ids of each prompt."""
    given = asked.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    made = []
    for prompt in several:
        if isinstance(prompt, str):
            _check_size(len(prompt), server.max_context, "prompt")
            ids = model.words.text(prompt)
            if not ids:
                raise Refusal(400, "an empty prompt has nothing to go on from", "prompt")
        else:
            ids = prompt  # type: ignore[assignment]
            size = server.engine.backend.vocab_size
            if max(ids) >= size:
                raise Refusal(400, f"token {max(ids)}: the vocabulary has {size}", "prompt")
        made.append(list(ids))
    return made


def _usage(jobs: list[Job], form: _Form) -> dict[str, Any]:
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
