"""Owns refusals: what a request that is not answered is told, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

MEANINGS = {
    400: "the request is wrong",
    401: "no API key, or a wrong one",
    404: "no such model or route",
    405: "the route has another method",
    408: "the body came too slowly, or the answer took too long",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too many requests wait already",
    503: "the server is stopping or full, or the model failed",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {
        "description": what,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
    }
    for code, what in MEANINGS.items()
}
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def error_reply(
    status: int,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's form; those that pass say when to come back."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    # A message may repeat what came, and what came may hold half a character.
    shown = message.encode("utf-8", "replace").decode("utf-8")
    body = {"message": shown, "type": kind, "param": param, "code": None}
    extra = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse({"error": body}, status, headers={**extra, **dict(headers or {})})
