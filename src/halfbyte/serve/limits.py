"""Owns the limits of requests: keys, origins, sizes and times, checked before a request reaches a route."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from halfbyte.serve.refusal import RefusedError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/health", "/ready", "/")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADER_SECONDS = 10.0
SEND_SECONDS = 60.0  # within which a client must read some of the data that waits for it
# How long and how much of a refused body is still read: closing the connection while the client is sending
# would reset it, and the client would lose the reply.
LINGER_SECONDS = 2.0
LINGER_BYTES = 1 << 25
HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2000}")  # a list of them


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        body_bytes: size of a body.
        body_seconds: time within which the whole body must arrive.
        answer_seconds: time from the request to the end of its answer.
        max_waiting: number of answers that may wait for a slot.
        max_connections: number of open connections.
        api_keys: keys of which each request must send one; empty if none is required.
        origins: origins of web pages that may use the server from a browser, besides its own page.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 20.0
    answer_seconds: float = 600.0
    max_waiting: int = 256
    max_connections: int = 512
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Guard:
    """ASGI middleware that checks every request and logs one line for it, without its content.

    Args:
        app: the app that it guards.
        limits: the limits to check.
        observe: called with the route, status and seconds of each request.
        log: called with the line.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        observe: Callable[[str, int, float], None],
        log: Callable[[str], None],
    ) -> None:
        self.app, self.limits, self.observe, self.log = app, limits, observe, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection, as ASGI defines."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        await _GuardedRequest(self, scope, receive, send).run()


class _GuardedRequest:
    """One request."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope = guard, scope
        self._receive, self._send = receive, send
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        length = self.headers.get("content-length", "0")
        # No limit has more than 20 digits.
        self.length = int(length[:20]) if length.isdecimal() else None
        client_id = self.headers.get("x-request-id", "")
        self.id = client_id if REQUEST_ID.fullmatch(client_id) else secrets.token_hex(8)
        self.origin = self._allowed_origin()
        self.status = 0
        self.received_bytes = 0
        self.body_is_complete = self.body_is_cut = False
        self.start = time.monotonic()
        # When the reply was complete, if its client may still be sending.
        self.replied_at: float | None = None
        self.deadline = self.start + guard.limits.body_seconds

    async def run(self) -> None:
        """Refuse the request, or pass it on to the app."""
        refusal = self._refusal()
        try:
            if self.scope["method"] == "OPTIONS" and self.origin:
                await self._send_plain(204, b"")
            elif refusal is not None:
                await self._send_error(*refusal)
            else:
                await self.guard.app(self.scope, self._receive_limited, self._send_with_headers)
        finally:
            seconds = (self.replied_at or time.monotonic()) - self.start
            route = getattr(self.scope.get("route"), "path", "other")
            self.guard.observe(route, self.status, seconds)
            self.guard.log(
                f"{self.id} {self.scope['method']} {route} {self.status} {seconds:.3f} s"
            )

    def _refusal(self) -> tuple[int, str] | None:
        limits, path = self.guard.limits, self.scope["path"]
        if not limits.api_keys and self._host() not in LOCAL_NAMES:
            # A foreign web page could resolve its own name to this machine (DNS rebinding).
            return 400, "requests to a host name other than localhost require an API key"
        if limits.api_keys and path not in PUBLIC and not self._has_key():
            return 401, "an API key is required: Authorization: Bearer KEY"
        if self.length is None:
            return 400, "Content-Length is not a number"
        if self.length > limits.body_bytes:
            return 413, f"the body has {self.length} bytes; at most {limits.body_bytes} are allowed"
        return None

    def _host(self) -> str:
        host = self.headers.get("host", "")
        return re.sub(r":\d+$", "", host).strip("[]").lower()

    def _has_key(self) -> bool:
        scheme, _, credentials = self.headers.get("authorization", "").partition(" ")
        key = credentials.strip().encode("latin-1", "replace")
        valid_keys = [valid.encode() for valid in self.guard.limits.api_keys]
        matches = [hmac.compare_digest(key, valid) for valid in valid_keys]
        return scheme.lower() == "bearer" and any(matches)

    def _allowed_origin(self) -> str | None:
        origin = self.headers.get("origin")
        return origin if origin in self.guard.limits.origins else None

    def _allowed_headers(self) -> str:
        """Allow all headers that a page of a listed origin asks for: OpenAI's browser client adds some."""
        names = self.headers.get("access-control-request-headers", "")
        return names if HEADER_NAMES.fullmatch(names) else "authorization, content-type"

    async def _receive_limited(self) -> dict[str, Any]:
        """Return the next part of the body.

        Raises:
            HTTPException: the body is too large or too slow. FastAPI passes this exception on, but turns any
                other one into status 400.
        """
        if self.body_is_complete:
            return await self._receive()
        remaining = self.deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, remaining))
        except TimeoutError:
            self.body_is_cut = True
            raise HTTPException(408, "the body arrived too slowly") from None
        if message["type"] == "http.request":
            self.received_bytes += len(message.get("body", b""))
            self.body_is_complete = not message.get("more_body", False)
            if self.received_bytes > self.guard.limits.body_bytes:
                self.body_is_cut = True
                raise HTTPException(
                    413, f"the body has more than the allowed {self.guard.limits.body_bytes} bytes"
                )
        return message

    async def _send_with_headers(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = {"x-request-id": self.id, "x-content-type-options": "nosniff"}
            if self.origin:
                extra |= {
                    "access-control-allow-origin": self.origin,
                    "access-control-allow-headers": self._allowed_headers(),
                    "access-control-allow-methods": "GET, POST",
                    "access-control-expose-headers": "x-request-id, retry-after, x-halfbyte-ignored",
                    "access-control-max-age": "600",
                    "vary": "origin, access-control-request-headers",
                }
            if self._leaves_body_unread():
                extra["connection"] = "close"
            encoded = [(name.encode(), value.encode()) for name, value in extra.items()]
            message = {**message, "headers": [*message.get("headers", []), *encoded]}
        elif self._leaves_body_unread() and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            self.replied_at = time.monotonic()
            await self._discard_body()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _leaves_body_unread(self) -> bool:
        """Return whether the body was cut off or is too long; uvicorn itself discards a short one."""
        return self.body_is_cut or self.length is None or self.length > self.guard.limits.body_bytes

    async def _discard_body(self) -> None:
        """Read and discard the rest of the body, within limits, after the reply and before closing."""
        expects_continue = "expect" in self.headers and not self.received_bytes
        if self.body_is_complete or expects_continue:
            return
        remaining = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while remaining > 0:
                    message = await self._receive()
                    if not message.get("more_body", False):  # the end, or http.disconnect
                        return
                    remaining -= len(message["body"])

    async def _send_error(self, status: int, text: str) -> None:
        reply = RefusedError(status, text).reply()
        headers = list(reply.raw_headers)
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await self._send_with_headers(start)
        await self._send_with_headers({"type": "http.response.body", "body": reply.body})

    async def _send_plain(self, status: int, body: bytes) -> None:
        start = {"type": "http.response.start", "status": status, "headers": []}
        await self._send_with_headers(start)
        await self._send_with_headers({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 with limits on how long a request's head and a client's reading may take."""

    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the head of the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Handle bytes; start the timer for a new head, and stop it when the head is complete."""
        if self._head_timer is None:
            self._start_head_timer()
        super().data_received(data)
        if self._is_answering():
            self._stop_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer for a client that does not read; uvicorn waits for it."""
        super().pause_writing()
        self._start_send_timer()

    def resume_writing(self) -> None:
        """Stop the timer, as the client has read."""
        super().resume_writing()
        self._stop_send_timer()

    def _start_send_timer(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(SEND_SECONDS, self._check_send, unsent)

    def _check_send(self, unsent_before: int) -> None:
        if self.transport.get_write_buffer_size() < unsent_before:
            self._start_send_timer()
        else:
            self.transport.abort()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_if_idle(self) -> None:
        self._head_timer = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete
