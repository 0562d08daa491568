"""Owns the server process: uvicorn with our limits, and a stop that lets running answers end."""

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

# Longer than clients keep an idle connection (httpx 5 s, proxies 60 s), or requests race with its end.
KEEP_ALIVE_S = 75
BACKLOG = 1024
SHUTDOWN_S = 2  # in which replies are still sent once the engines have stopped


class DrainingServer(uvicorn.Server):
    """Uvicorn's server that keeps listening while it drains, so that new requests get status 503.

    The first SIGTERM or SIGINT starts the drain, a second one ends it at once.

    Args:
        config: uvicorn's configuration.
        service: tells whether answers are still in progress.
        grace_s: seconds that running answers have left.

    Attributes:
        failure: why a model cannot answer any more, or None.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float) -> None:
        super().__init__(config)
        self._service, self._grace_s = service, grace_s
        self._drain_deadline: float | None = None
        self.failure: str | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without uvicorn's re-raise at the end, which would prevent an exit code of 0."""
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the drain, or end it at once if it has started already."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._drain_deadline = time.monotonic() + self._grace_s

    async def on_tick(self, counter: int) -> bool:
        """Return whether to exit now; called every tenth of a second."""
        should_exit: bool = await super().on_tick(counter)
        engines = self._service.engines
        self.failure = next((engine.failure for engine in engines if engine.failure), None)
        if self.failure:
            return True
        if self._drain_deadline is None or should_exit:
            return should_exit
        if time.monotonic() > self._drain_deadline:
            for engine in engines:
                engine.cancel_all()
            return True
        # Answers that are complete may still have to be formatted and sent.
        return self._service.is_idle and not self.server_state.tasks


def serve(service: Service, sock: socket.socket, grace_s: float) -> None:
    """Answer requests until a signal arrives.

    Args:
        service: the models and limits.
        sock: of ``bind``.
        grace_s: seconds that running answers have left after SIGTERM.

    Raises:
        ModelError: a model has stopped answering, and the server must be restarted.
    """
    limits = service.limits
    sock.listen(BACKLOG)
    host, port, *_ = sock.getsockname()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    app = Guard(make_app(service), limits, service.metrics.observe_request, _log)
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
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    for engine in service.engines:
        engine.start()
    # Printed only now: whoever reads this line may send requests.
    print(f"serving at {url} (chat page: {url}/, API: {url}/v1)", flush=True)
    server = DrainingServer(config, service, grace_s)
    try:
        server.run(sockets=[sock])
    finally:
        for engine in service.engines:
            engine.stop()
        sock.close()
    print("stopped", flush=True)
    if server.failure:
        raise ModelError(f"a model has stopped answering: {server.failure}. Restart the server")


def bind(host: str, port: int) -> socket.socket:
    """Take an address before models are loaded; port 0 picks a free one.

    Raises:
        ConfigError: the server cannot listen there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            [
                f"--host {host} --port {port}: cannot listen on this address: {error}. Choose another --port"
            ]
        ) from None
    return sock


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
