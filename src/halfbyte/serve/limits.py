"""Owns what a stranger may do: keys, origins, sizes, times; before a request reaches a route."""

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
SEND_SECONDS = 60.0  # in which a client must take something of what waits for it
# What a refused client may still send; closing in its midst would reset the connection, and the reply
# that already waits for the client would be lost with it.
LINGER_SECONDS = 2.0
LINGER_BYTES = 1 << 25
NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2000}")  # of headers, in a list


@dataclass(frozen=True)
class Limits:
    """Bounds of requests.

    Attributes:
        body_bytes: of a request.
        body_seconds: in which it must be there.
        answer_seconds: from the request to the end of its answer.
        max_waiting: answers that may wait for a slot.
        max_connections: at once.
        api_keys: one of which each request must bring; empty: none is needed.
        origins: of pages that may use the server from a browser, beside its own.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 20.0
    answer_seconds: float = 600.0
    max_waiting: int = 256
    max_connections: int = 512
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Guard:
    """ASGI middleware in front of everything; writes one line for each request, without its content.

    Args:
        app: what it guards.
        limits: the bounds.
        told: called with route, status and seconds of each request.
        log: called with the line.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        told: Callable[[str, int, float], None],
        log: Callable[[str], None],
    ) -> None:
        self.app, self.limits, self.told, self.log = app, limits, told, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        await _Guarded(self, scope, receive, send).run()


class _Guarded:
    """One request."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope = guard, scope
        self._receive, self._send = receive, send
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        length = self.headers.get("content-length", "0")
        # More digits than any limit has need not be read.
        self.length = int(length[:20]) if length.isdecimal() else None
        given = self.headers.get("x-request-id", "")
        self.id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.origin = self._allowed_origin()
        self.status = 0
        self.received = 0
        self.is_read = self.is_cut = False
        self.start = time.monotonic()
        # When a reply was there whose client may still be sending.
        self.answered: float | None = None
        self.deadline = self.start + guard.limits.body_seconds

    async def run(self) -> None:
        """Refuse, or hand on."""
        refusal = self._refusal()
        try:
            if self.scope["method"] == "OPTIONS" and self.origin:
                await self._plain(204, b"")
            elif refusal is not None:
                await self._error(*refusal)
            else:
                await self.guard.app(self.scope, self._take, self._give)
        finally:
            seconds = (self.answered or time.monotonic()) - self.start
            route = getattr(self.scope.get("route"), "path", "other")
            self.guard.told(route, self.status, seconds)
            self.guard.log(
                f"{self.id} {self.scope['method']} {route} {self.status} {seconds:.3f} s"
            )

    def _refusal(self) -> tuple[int, str] | None:
        limits, path = self.guard.limits, self.scope["path"]
        if not limits.api_keys and self._host() not in LOCAL_NAMES:
            # A page elsewhere could point its own name at this machine (DNS rebinding).
            return 400, "called under another name than localhost, which needs an API key"
        if limits.api_keys and path not in PUBLIC and not self._has_key():
            return 401, "an API key is needed: Authorization: Bearer KEY"
        if self.length is None:
            return 400, "Content-Length is no number"
        if self.length > limits.body_bytes:
            return 413, f"{self.length} bytes; at most {limits.body_bytes} are taken"
        return None

    def _host(self) -> str:
        host = self.headers.get("host", "")
        return re.sub(r":\d+$", "", host).strip("[]").lower()

    def _has_key(self) -> bool:
        kind, _, key = self.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        keys = [known.encode() for known in self.guard.limits.api_keys]
        found = [hmac.compare_digest(given, known) for known in keys]
        return kind.lower() == "bearer" and any(found)

    def _allowed_origin(self) -> str | None:
        origin = self.headers.get("origin")
        return origin if origin in self.guard.limits.origins else None

    def _wanted_headers(self) -> str:
        """All that a page of a listed origin asks to send: OpenAI's client for browsers has its own."""
        wanted = self.headers.get("access-control-request-headers", "")
        return wanted if NAMES.fullmatch(wanted) else "authorization, content-type"

    async def _take(self) -> dict[str, Any]:
        """The next part of the body, if it is not too large or too slow.

        Raises:
            HTTPException: which FastAPI hands on, where it makes a 400 of any other.
        """
        if self.is_read:
            return await self._receive()
        left = self.deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, left))
        except TimeoutError:
            self.is_cut = True
            raise HTTPException(408, "the body came too slowly") from None
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.is_read = not message.get("more_body", False)
            if self.received > self.guard.limits.body_bytes:
                self.is_cut = True
                raise HTTPException(
                    413,
                    f"more than {self.guard.limits.body_bytes} bytes, which are all that is taken",
                )
        return message

    async def _give(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = {"x-request-id": self.id, "x-content-type-options": "nosniff"}
            if self.origin:
                extra |= {
                    "access-control-allow-origin": self.origin,
                    "access-control-allow-headers": self._wanted_headers(),
                    "access-control-allow-methods": "GET, POST",
                    "access-control-expose-headers": "x-request-id, retry-after",
                    "access-control-max-age": "600",
                    "vary": "origin, access-control-request-headers",
                }
            if self._leaves_body():
                extra["connection"] = "close"
            made = [(name.encode(), value.encode()) for name, value in extra.items()]
            message = {**message, "headers": [*message.get("headers", []), *made]}
        elif self._leaves_body() and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            self.answered = time.monotonic()
            await self._read_away()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _leaves_body(self) -> bool:
        """Whether a body was cut, or is announced and too long; uvicorn itself reads away a short one."""
        return self.is_cut or self.length is None or self.length > self.guard.limits.body_bytes

    async def _read_away(self) -> None:
        """Throw away what still comes, within bounds; the reply is there, the connection is still open."""
        waits = "expect" in self.headers and not self.received  # to be asked for its body
        if self.is_read or waits:
            return
        left = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0:
                    message = await self._receive()
                    if not message.get("more_body", False):  # the end, or http.disconnect
                        return
                    left -= len(message["body"])

    async def _error(self, status: int, text: str) -> None:
        reply = RefusedError(status, text).reply()
        headers = list(reply.raw_headers)
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self._give({"type": "http.response.start", "status": status, "headers": headers})
        await self._give({"type": "http.response.body", "body": reply.body})

    async def _plain(self, status: int, body: bytes) -> None:
        await self._give({"type": "http.response.start", "status": status, "headers": []})
        await self._give({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, which waits only so long for the head of a request, and for a client to read."""

    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A connection has been opened."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._head_timer is None:
            self._watch_head()
        super().data_received(data)
        if self._is_answering():
            self._stop_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what is there; uvicorn waits for it."""
        super().pause_writing()
        self._watch_send()

    def resume_writing(self) -> None:
        """It has."""
        super().resume_writing()
        self._stop_send_timer()

    def _watch_send(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(SEND_SECONDS, self._check_send, left)

    def _check_send(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_send()
        else:
            self.transport.abort()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _watch_head(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete
