"""Owns refusals: the errors, in OpenAI's format, of requests that are not answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

MEANINGS = {
    400: "the request is invalid",
    401: "the API key is missing or wrong",
    404: "the model or route does not exist",
    405: "the route does not support this method",
    408: "the body arrived too slowly, or the answer took too long",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too many requests are waiting",
    503: "the server is stopping or full, or the model failed",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
    }
    for code, description in MEANINGS.items()
}
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request is refused."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error object in OpenAI's format."""
        error_type = ERROR_TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        # A message may quote the request, which may contain half a character.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        return {
            "error": {
                "message": message,
                "type": error_type,
                "param": self.param,
                "code": self.code,
            }
        }

    def reply(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return the response, which says when to retry, or that it is no use (408 would recur)."""
        extra = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 408:
            extra["x-should-retry"] = "false"
        return JSONResponse(self.body, self.status, headers={**extra, **dict(headers or {})})
