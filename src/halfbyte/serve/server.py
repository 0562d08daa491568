"""Owns the process: uvicorn with our limits, and a stop that lets running answers end."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn

from halfbyte.errors import ConfigError, ModelError
from halfbyte.serve.api import make_app
from halfbyte.serve.limits import Guard, PatientProtocol
from halfbyte.serve.service import Service

KEEP_ALIVE_S = (
    75  # idle; more than clients keep a connection (httpx 5 s, proxies 60 s), or they race
)
BACKLOG = 1024
LAST_WORDS_S = 2  # for replies to be sent once the engines have stopped


class DrainingServer(uvicorn.Server):
    """Uvicorn's server, which goes on listening while it drains, so that new requests are told 503.

    The first SIGTERM or SIGINT begins the drain, a second one ends it at once.

    Args:
        config: uvicorn's.
        service: says whether answers are still being made.
        grace_s: seconds that running answers have.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float) -> None:
        super().__init__(config)
        self._service, self._grace_s = service, grace_s
        self._until: float | None = None
        self.lost: str | None = None  # why a model is given up

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises the signal again at the end, and the process would not exit with 0."""
        wanted = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._until = time.monotonic() + self._grace_s

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether to end now."""
        ending: bool = await super().on_tick(counter)
        self.lost = next((one.failure for one in self._service.engines if one.failure), None)
        if self.lost:
            return True
        if self._until is None or ending:
            return ending
        if time.monotonic() > self._until:
            for engine in self._service.engines:
                engine.cancel_all()
            return True
        # Answers that are made may yet have to be worded and sent.
        return self._service.is_idle and not self.server_state.tasks


def serve(service: Service, host: str, port: int, grace_s: float) -> None:
    """Answer requests until a signal comes.

    Args:
        service: what is served.
        host: address to listen on.
        port: 0 takes a free one.
        grace_s: seconds that running answers have after SIGTERM.

    Raises:
        ConfigError: the address cannot be listened on.
        ModelError: a model answers nothing any more; whoever started the server may start it anew.
    """
    limits = service.limits
    sock = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    place = f"http://{shown}:{sock.getsockname()[1]}"
    app = Guard(make_app(service), limits, service.metrics.told, _log)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    for engine in service.engines:
        engine.start()
    # Only now: whoever reads this line may call.
    print(f"serving at {place} (page: {place}/, interface: {place}/v1)", flush=True)
    server = DrainingServer(config, service, grace_s)
    try:
        server.run(sockets=[sock])
    finally:
        for engine in service.engines:
            engine.stop()
        sock.close()
    print("stopped", flush=True)
    if server.lost:
        raise ModelError(f"a model answers nothing any more: {server.lost}. Start the server anew")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            [f"--host {host} --port {port}: cannot be listened on: {error}. Choose another --port"]
        ) from None
    return sock


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
