"""Owns the API: OpenAI's routes, the chat page, and the routes for monitoring."""

from __future__ import annotations

import itertools
import re
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from halfbyte.errors import DataError
from halfbyte.serve import page
from halfbyte.serve.chat_reply import ChatReplyBuilder
from halfbyte.serve.completion_reply import CompletionReplyBuilder
from halfbyte.serve.ignored import account, header
from halfbyte.serve.refusal import ERRORS, RefusedError
from halfbyte.serve.replies import reply
from halfbyte.serve.reply_schema import (
    ChatReply,
    DetokenizeReply,
    ErrorReply,
    ModelCard,
    ModelList,
    ResponseReply,
    TextReply,
    TokenizeReply,
)
from halfbyte.serve.response_schema import ResponsesRequest, as_chat
from halfbyte.serve.responses import ResponsesReplyBuilder
from halfbyte.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from halfbyte.serve.service import ServedModel, Service, check_vocabulary
from halfbyte.serve.submission import (
    PendingChat,
    PendingCompletion,
    submit_chat,
    submit_completion,
    tokens_of,
)

FIELD_NAME = re.compile(r"(?!str$|int$)[a-z_0-9]+")
EVENT_SCHEMA = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}},
    "required": ["data"],
}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}}
}
MAX_QUOTED = 200  # characters of a request that an error quotes


def make_app(service: Service) -> FastAPI:
    """Return the app with all routes; ``limits.Guard`` checks keys, body sizes and times."""
    app = FastAPI(
        title="halfbyte", docs_url=None, redoc_url=None, responses=ERRORS, redirect_slashes=False
    )
    app.include_router(_state_routes(service))
    app.include_router(_openai_routes(service))
    app.include_router(_token_routes(service))
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
    routes = APIRouter(tags=["openai"])
    options: dict[str, Any] = {
        "dependencies": [Depends(_require_json)],
        "responses": STREAM_RESPONSES,
    }

    @routes.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_model_card(model) for model in service.served.values()])

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        return _model_card(service.get_model(name))

    @routes.post("/v1/chat/completions", response_model=ChatReply, **options)
    async def chat(body: ChatRequest, request: Request) -> Any:
        model = service.get_model(body.model)
        pending = await submit_chat(service, model, body)
        builder = ChatReplyBuilder(
            model,
            pending.prompt,
            wants_logprobs=bool(body.logprobs),
            with_usage=_wants_usage(body),
            one_call=body.parallel_tool_calls is False,
        )
        return await reply(service, request, builder, pending.submitted, **_delivery(body, pending))

    @routes.post("/v1/completions", response_model=TextReply, **options)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        model = service.get_model(body.model)
        pending = await submit_completion(service, model, body)
        builder = CompletionReplyBuilder(
            model,
            pending.echoed,
            wants_logprobs=body.logprobs is not None,
            with_usage=_wants_usage(body),
        )
        return await reply(service, request, builder, pending.submitted, **_delivery(body, pending))

    @routes.post("/v1/responses", response_model=ResponseReply, **options)
    async def respond(body: ResponsesRequest, request: Request) -> Any:
        model = service.get_model(body.model)
        chat = as_chat(body)
        pending = await submit_chat(service, model, chat, account(body))
        builder = ResponsesReplyBuilder(model, pending.prompt, body)
        return await reply(service, request, builder, pending.submitted, **_delivery(chat, pending))

    return routes


def _token_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["tokens"])
    needs_json = [Depends(_require_json)]

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return service.tokenizer_info()

    @routes.post("/tokenize", dependencies=needs_json)
    async def tokenize(body: TokenizeRequest, response: Response) -> TokenizeReply:
        model = service.get_model(body.model) if body.model else service.first_model
        ids, ignored = await run_in_threadpool(tokens_of, service, model, body)
        response.headers.update(header(ignored))
        strings = None
        if body.return_token_strs:
            strings = [model.codec.piece(token)[0] for token in ids]
        return TokenizeReply(
            tokens=ids,
            count=len(ids),
            max_model_len=service.max_context(model),
            token_strs=strings,
        )

    @routes.post("/detokenize", dependencies=needs_json)
    async def detokenize(body: DetokenizeRequest, response: Response) -> DetokenizeReply:
        response.headers.update(header(account(body)))
        model = service.get_model(body.model) if body.model else service.first_model
        check_vocabulary(model, body.tokens, "tokens")
        text = await run_in_threadpool(model.codec.decode_all, body.tokens)
        return DetokenizeReply(prompt=text, content=text)

    return routes


def _require_json(request: Request) -> None:
    """Refuse other content types: a foreign page can send plain text without a preflight, but not JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RefusedError(415, "Content-Type must be application/json")


def _delivery(body: GenerationRequest, pending: PendingChat | PendingCompletion) -> dict[str, Any]:
    """Return how a reply is sent."""
    return {"stream": bool(body.stream), "headers": header(pending.ignored)}


def _wants_usage(body: GenerationRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _model_card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, owned_by="halfbyte", parent=model.parent)
