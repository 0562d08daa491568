"""What bounds a request outside of the model: faults of a huge body, a client that does not read, memory."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import types
from typing import Any

import pytest
import uvicorn
from pydantic import ValidationError

from halfbyte.errors import ModelError
from halfbyte.serve import limits
from halfbyte.serve.limits import Limits, PatientProtocol
from halfbyte.serve.loading import Options, _slots
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.schema import ChatRequest, CompletionRequest
from halfbyte.serve.server import bind, serve
from halfbyte.serve.service import PromptRequest, Service
from halfbyte.serve.text import TextStream


def test_a_body_full_of_faults_is_refused_by_its_first_ones() -> None:
    bad = [[-1] * 20_000] * 16
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"model": "m", "prompt": bad})
    assert len(refused.value.errors()) < 60
    unknown = {f"field {number}": number for number in range(100_000)}
    for body in ({"metadata": unknown}, unknown, {"messages": [unknown]}):
        with pytest.raises(ValidationError) as refused:
            ChatRequest.model_validate({"model": "m", "messages": [], **body})
        assert len(refused.value.errors()) < 5
    messages = [{"role": "nobody", "content": 1, "more": 2}] * 250
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate({"model": "m", "messages": messages})
    assert len(refused.value.errors()) < 20


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.5)
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """A stream that goes on until its client has gone."""
        gone = asyncio.create_task(receive())
        await gone  # the body
        gone = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    config = uvicorn.Config(
        app, port=0, http=PatientProtocol, ws="none", lifespan="off", log_level="error"
    )
    server = uvicorn.Server(config)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    for reads in (True, False):
        ended.clear()
        with socket.create_connection(sock.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            until = time.monotonic() + 2
            while reads and time.monotonic() < until:
                assert client.recv(1 << 20)
            if reads:
                assert not ended.is_set()  # one that reads is served on
            else:
                assert ended.wait(20)
        assert ended.wait(20)  # of this connection, before the next one begins
    server.should_exit = True
    thread.join(20)


def test_as_many_slots_as_half_of_the_free_memory_holds() -> None:
    assert _slots(Options(), "m", 4096, 10, 10_000) == 16
    assert _slots(Options(), "m", 4096, 1000, 10_000) == 5
    with pytest.raises(ModelError, match="fewer --slots or a shorter --max-context"):
        _slots(Options(slots=6), "m", 4096, 1000, 10_000)
    with pytest.raises(ModelError, match="1 x 4096 tokens"):
        _slots(Options(), "m", 4096, 1000, 1_500)
    with pytest.raises(ModelError):
        _slots(Options(), "m", 4096, 1000, -5)


def test_a_lost_model_ends_the_server_with_an_error() -> None:
    class Failed:
        failure, num_waiting, num_running = "it has failed", 0, 0

        def start(self) -> None:
            """Nothing to do."""

        stop = cancel_all = start

    service = Service([], Limits())
    service.engines = [Failed()]  # type: ignore[list-item]
    with pytest.raises(ModelError, match="it has failed"):
        serve(service, bind("127.0.0.1", 0), 1.0)


def test_log_probabilities_of_a_request_are_bounded() -> None:
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 8}
    )
    backend = types.SimpleNamespace(max_context=4096)
    codec = types.SimpleNamespace(vocab_size=100)
    engine = types.SimpleNamespace(backend=backend)
    model: Any = types.SimpleNamespace(name="m", engine=engine, codec=codec)
    service = Service([], Limits())
    requests = PromptRequest([1] * 10, lambda: TextStream(str))
    for top in (0, 20):
        with pytest.raises(RefusedError, match="at most 200000 are allowed"):
            service.submit(request, model, [requests] * 8, None, top)
