"""Owns the interface: OpenAI's routes, the page, and what watches over a server asks."""

from __future__ import annotations

import itertools
import re
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from halfbyte.data.rows import Message
from halfbyte.errors import DataError
from halfbyte.serve import page
from halfbyte.serve.refusal import ERRORS, RefusedError
from halfbyte.serve.replies import ChatForm, TextForm, reply
from halfbyte.serve.schema import (
    ChatMessage,
    ChatReply,
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    Generation,
    ModelCard,
    ModelList,
    TextReply,
)
from halfbyte.serve.service import Served, Service

FIELD = re.compile(r"(?!str$|int$)[a-z_0-9]+")
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}
}
COMPLETION_TOKENS = 16  # where none are asked for, as at OpenAI; a chat has all that is left
ROLES = {"developer": "system"}  # OpenAI's newer word for it
MAX_SHOWN = 200  # characters of what came that an error repeats


def make_app(service: Service) -> FastAPI:
    """All routes. Keys and the limits of bodies and connections are ``limits.Guard``'s."""
    app = FastAPI(
        title="halfbyte", docs_url=None, redoc_url=None, responses=ERRORS, redirect_slashes=False
    )
    app.include_router(_state(service))
    app.include_router(_openai(service))
    _say_errors(app)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schemas = schema["components"]["schemas"]
        error = ErrorReply.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**error.pop("$defs"), "ErrorReply": error}
        for method in itertools.chain(*(route.values() for route in schema["paths"].values())):
            method["responses"].pop("422", None)  # FastAPI's own, which is 400 here
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _say_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return error.reply()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Of several ways to read a field, one that fits its type but not its bounds is meant.
        faults = error.errors()
        fault = next((one for one in faults if not one["type"].endswith("_type")), faults[0])
        # The way of reading stands among the names as str, list[…] or constrained-str.
        parts = [str(part) for part in fault["loc"][1:] if FIELD.fullmatch(str(part))]
        place = ".".join(parts)[:MAX_SHOWN]
        told = f"{place or 'body'}: {fault['msg']}"[: 2 * MAX_SHOWN]
        return RefusedError(400, told, place or None).reply()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return RefusedError(error.status_code, str(error.detail)).reply(error.headers)

    @app.exception_handler(DataError)
    async def wrong_data(request: Request, error: DataError) -> JSONResponse:
        return RefusedError(400, str(error)).reply()


def _state(service: Service) -> APIRouter:
    routes = APIRouter(tags=["state"])

    @routes.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    @routes.get("/ready", response_class=PlainTextResponse)
    async def ready() -> str:
        service.check_open()
        failed = [engine.failure for engine in service.engines if engine.failure]
        if failed:
            raise RefusedError(503, failed[0])
        return "ready"

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type=service.metrics.media_type)

    @routes.get("/", response_class=HTMLResponse)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    return routes


def _openai(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])
    asks: dict[str, Any] = {"dependencies": [Depends(_json_only)], "responses": STREAMED}

    @routes.get("/models")
    async def models() -> ModelList:
        return ModelList(data=[_card(one) for one in service.served.values()])

    @routes.get("/models/{name}")
    async def model(name: str) -> ModelCard:
        return _card(service.need(name))

    @routes.post("/chat/completions", response_model=ChatReply, **asks)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        model = service.need(asked.model)
        _check_together(asked)
        _check_chat(asked)
        service.check_open()
        service.check_size(sum(len(_text(one)) for one in asked.messages), model, "messages")
        turns = tuple(Message(ROLES.get(one.role, one.role), _text(one)) for one in asked.messages)
        ids = await run_in_threadpool(model.words.chat, turns)
        matchers = await run_in_threadpool(_matchers, asked, model)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        max_tokens = asked.max_tokens or asked.max_completion_tokens
        submitted = service.submit(asked, model, [ids], max_tokens, top, matchers)
        form = ChatForm(model, wants_logprobs=bool(asked.logprobs))
        return await reply(service, request, asked, form, submitted)

    @routes.post("/completions", response_model=TextReply, **asks)
    async def complete(asked: CompletionRequest, request: Request) -> Any:
        model = service.need(asked.model)
        _check_together(asked)
        service.check_open()
        prompts = await run_in_threadpool(_prompts, asked, model, service)
        max_tokens = asked.max_tokens or COMPLETION_TOKENS
        submitted = service.submit(asked, model, prompts, max_tokens, asked.logprobs)
        form = TextForm(model, wants_logprobs=asked.logprobs is not None)
        return await reply(service, request, asked, form, submitted)

    return routes


def _json_only(request: Request) -> None:
    """A page elsewhere can send plain text without asking first, but not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, "Content-Type must be application/json")


def _check_together(asked: Generation) -> None:
    """Settings that only mean something beside another one."""
    if asked.stream_options is not None and not asked.stream:
        raise RefusedError(400, "stream_options needs stream to be true", "stream_options")


def _check_chat(asked: ChatRequest) -> None:
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise RefusedError(
            400, "max_tokens and max_completion_tokens are one; give one", "max_tokens"
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise RefusedError(400, "top_logprobs needs logprobs to be true", "top_logprobs")


def _card(one: Served) -> ModelCard:
    return ModelCard(id=one.name, created=one.created, owned_by="halfbyte", parent=one.parent)


def _text(message: ChatMessage) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _matchers(asked: ChatRequest, model: Served) -> list[Any] | None:
    """A grammar's state for each answer, where they have a form."""
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema: dict[str, Any] | None = {"type": "object"}
    if wanted.type == "json_schema":
        schema = wanted.json_schema.json_schema if wanted.json_schema else None
    if schema is None:
        raise RefusedError(400, "json_schema.schema is needed", "response_format")
    return [model.words.matcher(schema) for _ in range(asked.n or 1)]


def _prompts(asked: CompletionRequest, model: Served, service: Service) -> list[list[int]]:
    """Ids of each prompt."""
    given = asked.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    made: list[list[int]] = []
    for prompt in several:
        if isinstance(prompt, str):
            service.check_size(len(prompt), model, "prompt")
            ids = model.words.text(prompt)
            if not ids:
                raise RefusedError(400, "an empty prompt has nothing to go on from", "prompt")
        else:
            ids = [int(token) for token in prompt]
            if max(ids) >= model.words.vocab_size:
                raise RefusedError(
                    400, f"token {max(ids)}: the vocabulary has {model.words.vocab_size}", "prompt"
                )
        made.append(ids)
    return made
