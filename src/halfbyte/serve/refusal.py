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

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI words it."""
        kind = KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        # A message may repeat what came, and what came may hold half a character.
        shown = self.message.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": shown, "type": kind, "param": self.param, "code": self.code}}

    def reply(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The response; it says when to come back, or that it is no use (408: the same would come)."""
        extra = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 408:
            extra["x-should-retry"] = "false"
        return JSONResponse(self.body, self.status, headers={**extra, **dict(headers or {})})
