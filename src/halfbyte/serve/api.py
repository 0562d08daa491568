"""Owns the API: OpenAI's routes, the chat page, and the routes for monitoring."""

from __future__ import annotations

import itertools
import re
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from halfbyte.data.conversation import Message
from halfbyte.errors import DataError
from halfbyte.serve import page
from halfbyte.serve.refusal import ERRORS, RefusedError
from halfbyte.serve.replies import ChatReplyBuilder, CompletionReplyBuilder, reply
from halfbyte.serve.schema import (
    ChatMessage,
    ChatReply,
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    GenerationRequest,
    ModelCard,
    ModelList,
    TextReply,
)
from halfbyte.serve.service import ServedModel, Service

FIELD_NAME = re.compile(r"(?!str$|int$)[a-z_0-9]+")
EVENT_SCHEMA = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}},
    "required": ["data"],
}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}}
}
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens; a chat defaults to the rest of the context
ROLES = {"developer": "system"}  # OpenAI's newer name for it
MAX_QUOTED = 200  # characters of a request that an error quotes


def make_app(service: Service) -> FastAPI:
    """Return the app with all routes; ``limits.Guard`` checks keys, body sizes and times."""
    app = FastAPI(
        title="halfbyte", docs_url=None, redoc_url=None, responses=ERRORS, redirect_slashes=False
    )
    app.include_router(_state_routes(service))
    app.include_router(_openai_routes(service))
    _add_error_handlers(app)
    default_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        schema = default_openapi()
        schemas = schema["components"]["schemas"]
        error = ErrorReply.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**error.pop("$defs"), "ErrorReply": error}
        for method in itertools.chain(*(route.values() for route in schema["paths"].values())):
            method["responses"].pop("422", None)  # FastAPI's default, which is 400 here
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return error.reply()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # If a field may have several types, prefer the one that fits but is out of bounds.
        faults = error.errors()
        fault = next((one for one in faults if not one["type"].endswith("_type")), faults[0])
        # The location also contains names of types, such as str, list[…] or constrained-str.
        parts = [str(part) for part in fault["loc"][1:] if FIELD_NAME.fullmatch(str(part))]
        field = ".".join(parts)[:MAX_QUOTED]
        message = f"{field or 'body'}: {fault['msg']}"[: 2 * MAX_QUOTED]
        return RefusedError(400, message, field or None).reply()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return RefusedError(error.status_code, str(error.detail)).reply(error.headers)

    @app.exception_handler(DataError)
    async def wrong_data(request: Request, error: DataError) -> JSONResponse:
        return RefusedError(400, str(error)).reply()


def _state_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["state"])

    @routes.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    @routes.get("/ready", response_class=PlainTextResponse)
    async def ready() -> str:
        service.check_accepting()
        failures = [engine.failure for engine in service.engines if engine.failure]
        if failures:
            raise RefusedError(503, failures[0])
        return "ready"

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type=service.metrics.media_type)

    @routes.get("/", response_class=HTMLResponse)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    return routes


def _openai_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])
    options: dict[str, Any] = {
        "dependencies": [Depends(_require_json)],
        "responses": STREAM_RESPONSES,
    }

    @routes.get("/models")
    async def models() -> ModelList:
        return ModelList(data=[_model_card(model) for model in service.served.values()])

    @routes.get("/models/{name}")
    async def model(name: str) -> ModelCard:
        return _model_card(service.get_model(name))

    @routes.post("/chat/completions", response_model=ChatReply, **options)
    async def chat(body: ChatRequest, request: Request) -> Any:
        model = service.get_model(body.model)
        _check_stream_options(body)
        _check_chat(body)
        service.check_accepting()
        texts = [_message_text(message) for message in body.messages]
        service.check_length(sum(map(len, texts)), model, "messages")
        messages = tuple(
            Message(ROLES.get(message.role, message.role), text)
            for message, text in zip(body.messages, texts, strict=True)
        )
        ids = await run_in_threadpool(model.codec.encode_chat, messages)
        matchers = await run_in_threadpool(_matchers, body, model)
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_tokens or body.max_completion_tokens
        submitted = service.submit(body, model, [ids], max_tokens, top_logprobs, matchers)
        builder = ChatReplyBuilder(model, wants_logprobs=bool(body.logprobs))
        return await reply(service, request, body, builder, submitted)

    @routes.post("/completions", response_model=TextReply, **options)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        model = service.get_model(body.model)
        _check_stream_options(body)
        service.check_accepting()
        prompts = await run_in_threadpool(_prompt_ids, body, model, service)
        max_tokens = body.max_tokens or COMPLETION_TOKENS
        submitted = service.submit(body, model, prompts, max_tokens, body.logprobs)
        builder = CompletionReplyBuilder(model, wants_logprobs=body.logprobs is not None)
        return await reply(service, request, body, builder, submitted)

    return routes


def _require_json(request: Request) -> None:
    """Refuse other content types: a foreign page can send plain text without a preflight, but not JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RefusedError(415, "Content-Type must be application/json")


def _check_stream_options(body: GenerationRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise RefusedError(400, "stream_options requires stream to be true", "stream_options")


def _check_chat(body: ChatRequest) -> None:
    """Refuse settings that contradict or need another one."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RefusedError(
            400, "max_tokens and max_completion_tokens mean the same; set only one", "max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise RefusedError(400, "top_logprobs requires logprobs to be true", "top_logprobs")


def _model_card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, owned_by="halfbyte", parent=model.parent)


def _message_text(message: ChatMessage) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _matchers(body: ChatRequest, model: ServedModel) -> list[Any] | None:
    """Return a grammar's state for each answer, or None if the answers are free text."""
    response_format = body.response_format
    if response_format is None or response_format.type == "text":
        return None
    schema: dict[str, Any] | None = {"type": "object"}
    if response_format.type == "json_schema":
        named_schema = response_format.json_schema
        schema = named_schema.json_schema if named_schema else None
    if schema is None:
        raise RefusedError(400, "json_schema.schema is required", "response_format")
    return [model.codec.matcher(schema) for _ in range(body.n or 1)]


def _prompt_ids(body: CompletionRequest, model: ServedModel, service: Service) -> list[list[int]]:
    """Return the token ids of each prompt."""
    field = body.prompt
    prompts = field if isinstance(field, list) and not isinstance(field[0], int) else [field]
    ids_of_prompts: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            service.check_length(len(prompt), model, "prompt")
            ids = model.codec.encode_text(prompt)
            if not ids:
                raise RefusedError(400, "the prompt must not be empty", "prompt")
        else:
            ids = [int(token) for token in prompt]
            if max(ids) >= model.codec.vocab_size:
                raise RefusedError(
                    400,
                    f"token {max(ids)} is outside the vocabulary of {model.codec.vocab_size} tokens",
                    "prompt",
                )
        ids_of_prompts.append(ids)
    return ids_of_prompts
