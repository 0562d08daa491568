"""What strangers send: generated requests, broken and huge ones, slow and vanishing clients."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving import Process, serving
from waiting import wait_until

pytestmark = pytest.mark.real
CHAT = "/v1/chat/completions"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
MAX_GROWTH = 1.05  # of memory, from before the attacks to after them
MAX_HEALTH_S = 1.0


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, merged_run: Path, other_run: Path, tool_run: Path
) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("attacked")
    runs = (f"first={merged_run}", other_run, tool_run)
    options = ("--compute-dtype", "fp32", "--max-context", 512)
    with serving(folder / "log", *runs, *options) as process:
        yield process


def body(**more: Any) -> dict[str, Any]:
    return {"model": "first", "messages": [{"role": "user", "content": "Hello"}]} | more


def is_alive(server: Process) -> bool:
    reply = httpx.post(server.url + CHAT, json=body(max_tokens=2), timeout=60)
    return reply.status_code == 200 and server.popen.poll() is None


def fuzz(server: Process, mode: str, num_examples: int, phases: str) -> str:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--mode", mode, "--max-examples", str(num_examples), "--checks", ",".join(CHECKS)]
    command += ["--phases", phases, "--continue-on-failure", "--seed", "1"]
    hooks = str(Path(__file__).parent / "schema_hooks.py")
    environment = dict(os.environ) | {"SCHEMATHESIS_HOOKS": hooks}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=server.log.parent
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_generated_requests_are_answered_or_refused(server: Process, mode: str) -> None:
    assert "passed" in fuzz(server, mode, 5, "fuzzing")
    assert is_alive(server)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_a_thousand_generated_requests_a_route(server: Process, mode: str) -> None:
    phases = "coverage,fuzzing"
    # What first requests leave behind, buffers and threads, is there for good.
    fuzz(server, mode, 20, phases)
    before = server.rss_bytes
    output = fuzz(server, mode, 1000, phases)
    print(output[-1500:])
    assert is_alive(server)
    print(f"memory {before / 1e6:.0f} MB before, {server.rss_bytes / 1e6:.0f} MB after")
    assert server.rss_bytes <= MAX_GROWTH * before
    log = server.log.read_text()
    assert " 200 " in log
    assert " 500 " not in log
    assert "engine" not in log


BROKEN: dict[str, bytes] = {
    "no JSON": b"{",
    "bad UTF-8": b'{"model": "\xff\xfe"}',
    "deep": b"[" * 200_000,
    "deep in a field": b'{"model": "first", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "NaN": json.dumps(body(temperature=float("nan"))).encode(),
    "large temperature": json.dumps(body(temperature=1e30)).encode(),
    "infinite": b'{"model": "first", "messages": [], "temperature": 1e999}',
    "negative length": json.dumps(body(max_tokens=-2)).encode(),
    "huge length": json.dumps(body(max_tokens=2**63)).encode(),
    "a number of 5,000 digits": b'{"model": "first", "seed": ' + b"9" * 5000 + b"}",
    "100,000 unknown fields": json.dumps(body(**{f"a{n}": 0 for n in range(90_000)})).encode(),
    "a million answers": json.dumps(body(n=10**6)).encode(),
    "5,000 stops": json.dumps(body(stop=["x"] * 5000)).encode(),
    "empty stop": json.dumps(body(stop=[""])).encode(),
    "half a character": json.dumps(body(messages=[{"role": "user", "content": "\ud800"}])).encode(),
    "half a character as name": json.dumps(body(model="\udfff")).encode(),
    "a list": b"[]",
    "null": b"null",
    "no messages": json.dumps(body(messages=[])).encode(),
    "an unknown role": json.dumps(body(messages=[{"role": "root", "content": "x"}])).encode(),
    "a private character": json.dumps(
        body(messages=[{"role": "user", "content": "\U000f0000"}])
    ).encode(),
    "half a character in a tool": json.dumps(
        body(model="tools", tools=[{"function": {"name": "f", "parameters": {"a": "\ud800"}}}])
    ).encode(),
    "half a character in a call": json.dumps(
        body(
            model="tools",
            messages=[
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud800"}}}],
                },
            ],
        )
    ).encode(),
    "NaN in a tool": json.dumps(
        body(
            model="tools",
            tools=[{"function": {"name": "f", "parameters": {"minimum": float("nan")}}}],
        )
    ).encode(),
    "a deep tool": json.dumps(body(model="tools", tools=[0]))
    .encode()
    .replace(
        b"[0]",
        b'[{"function": {"name": "f", "parameters": ' + b'{"a": ' * 400 + b"1" + b"}" * 403 + b"]",
    ),
    "an endless schema": json.dumps(
        body(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"$ref": "#"}},
            }
        )
    ).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_requests_get_an_error_that_says_why(server: Process, name: str) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(server.url + CHAT, content=BROKEN[name], headers=headers, timeout=120)
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["message"]
    assert is_alive(server)


def test_a_nested_tool_costs_no_more_than_its_length(server: Process) -> None:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        nested = {"type": "object", "properties": {"a": nested}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": nested}}]
    content = body(model="tools", tools=tools, tool_choice="required", max_tokens=2)
    # What doubles with each level would take days.
    reply = httpx.post(server.url + CHAT, json=content, timeout=120)
    assert reply.status_code in (200, 400), reply.text


def test_many_wrong_tokens_are_one_error(server: Process) -> None:
    content = {"model": "first", "prompt": [[-1] * 20_000] * 15}
    reply = httpx.post(server.url + "/v1/completions", json=content, timeout=120)
    assert reply.status_code == 400
    assert "prompt" in reply.json()["error"]["message"]
    assert is_alive(server)


def test_a_wide_pattern_costs_no_more_than_its_answer(server: Process) -> None:
    schema = {"type": "string", "pattern": "(a{1,500}){1,500}"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    content = body(response_format=form, max_tokens=8)
    assert httpx.post(server.url + CHAT, json=content, timeout=120).status_code in (200, 400)
    assert is_alive(server)


def test_a_body_of_100_mb_is_refused_without_being_read(server: Process) -> None:
    before = server.rss_bytes

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000_000

    headers = {"content-type": "application/json"}
    for content in (b" " * 100_000_000, pieces()):
        try:
            reply = httpx.post(server.url + CHAT, content=content, headers=headers, timeout=120)
        except httpx.TransportError:  # closed while we were still sending
            continue
        assert reply.status_code == 413
    assert is_alive(server)
    assert server.rss_bytes < before + 20e6


def raw(server: Process) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=60)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    try:
        while part := sock.recv(65_536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(10_000)) + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["10,000 headers", "a long path", "TLS", "a negative length", "two lengths"],
)
def test_heads_that_are_none_are_refused(server: Process, head: bytes) -> None:
    with raw(server) as sock:
        sock.sendall(head)
        reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 4") or not reply
    assert is_alive(server)


def test_a_log_line_cannot_be_forged(server: Process) -> None:
    with raw(server) as sock:
        sock.sendall(
            b"GET /a%0d%0aforged HTTP/1.1\r\nhost: localhost\r\nx-request-id: a b\r\n"
            b"connection: close\r\n\r\n"
        )
        assert b"404" in read_all(sock)
    assert "forged" not in server.log.read_text()


def test_an_idle_connection_outlives_the_clients_patience(server: Process) -> None:
    # httpx gives up an idle connection after 5 s: a server that does so too races its clients.
    limits = httpx.Limits(keepalive_expiry=60)
    with httpx.Client(limits=limits) as client:
        first = client.get(server.url + "/health").extensions["network_stream"]
        sock = first.get_extra_info("socket")
        patience, before = 6, sock.gettimeout()
        sock.settimeout(patience)
        with pytest.raises(TimeoutError):  # the server would end it with an empty read
            sock.recv(1)
        sock.settimeout(before)
        again = client.get(server.url + "/health")
    assert again.is_success
    assert again.extensions["network_stream"] is first


def test_a_reply_comes_whole_though_the_body_is_late(server: Process) -> None:
    content = json.dumps(body()).encode()
    for method, path, status in (("TRACE", CHAT, b" 405 "), ("POST", "/nowhere", b" 404 ")):
        with raw(server) as sock:
            for _ in range(2):  # the connection is of use afterwards
                head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
                sock.sendall(head.encode())
                reply = sock.recv(100)
                sock.sendall(content)
                while not reply.endswith(b"}"):
                    reply += sock.recv(65_536)
                assert status in reply


@pytest.mark.slow
def test_slow_heads_and_bodies_are_cut(server: Process) -> None:
    heads = [raw(server) for _ in range(50)]
    heads[0].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")  # the next is as slow
    slow_body = raw(server)
    slow_body.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 1000\r\n\r\n{"
    )
    closed = 0
    for _ in range(20):
        for sock in heads:
            try:
                sock.sendall(b"x")
            except OSError:
                closed += 1
        check_health(server, 1, MAX_HEALTH_S)
        if closed >= len(heads):
            break
        select.select([slow_body], [], [], 1)  # a second, or until the server ends the slow body
    assert closed >= len(heads)
    assert b" 408 " in read_all(slow_body)
    for sock in [*heads, slow_body]:
        sock.close()


def test_answers_of_vanished_clients_are_cancelled(server: Process) -> None:
    for streams in (True, False):
        content = json.dumps(body(max_tokens=400, temperature=2.0, stream=streams)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        socks = [raw(server) for _ in range(24)]
        for sock in socks:
            sock.sendall(head.encode() + content)
        wait_until(lambda: running(server), "no answer begins")
        for sock in socks:
            sock.close()
        wait_until(lambda: not running(server), "answers go on without a client")
    assert is_alive(server)


def running(server: Process) -> int:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    gauges = [line for line in lines if line.startswith(("halfbyte_running ", "halfbyte_waiting "))]
    return int(sum(float(line.split()[1]) for line in gauges))


def check_health(server: Process, count: int, seconds: float = 60) -> None:
    """Each of ``count`` requests for the server's health is answered within so many seconds."""
    with httpx.Client(timeout=seconds) as client:
        for _ in range(count):
            assert client.get(f"{server.url}/health").status_code == 200


@pytest.mark.slow
def test_two_hundred_at_once_leave_health_and_memory_as_they_were(server: Process) -> None:
    def ask(number: int) -> int:
        options = {"max_tokens": 20, "temperature": 1.0, "seed": number}
        content = body(messages=[{"role": "user", "content": f"case {number} " * 10}], **options)
        return httpx.post(server.url + CHAT, json=content, timeout=120).status_code

    def burst(count: int) -> list[int]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(ask, range(count)))

    burst(100)  # what a first burst leaves behind, buffers and threads, is there for good
    before = server.rss_bytes
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.extend(burst(200)))
    thread.start()
    check_health(server, 100)  # each of them answered; how fast: benchmarks/serve_load.py
    thread.join()
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) > 100
    assert server.rss_bytes <= MAX_GROWTH * before
