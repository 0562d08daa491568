"""The judge: a real endpoint that chooses by a rule, asked twice, remembered, and refused by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.evaluation import Eval, Judge
from halfbyte.errors import UserError
from halfbyte.eval import judge
from halfbyte.eval.judge import judge_answers


@dataclass
class Endpoint:
    """An OpenAI-compatible server whose judge prefers by ``rule`` (prompt → reply)."""

    url: str = ""
    rule: Any = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    told = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            told.asked.append(body)
            told.keys.append(self.headers.get("authorization"))
            status = told.failures.pop() if told.failures else 200
            text = told.rule(body["messages"][0]["content"])
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield told
    server.shutdown()


@dataclass
class Settings:
    """As much of a config as the judge reads."""

    eval: Eval
    seed: int = 0


def ask(
    endpoint: Endpoint, cache: Path, asked: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    run: Any = Settings(Eval(judge=Judge(url=endpoint.url, model="wise", **more)))
    return judge_answers(run, asked, "adapter", ["base"], cache)["base"]


def rows_of(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "wanted": "right", "answers": {"adapter": ours, "base": theirs}}
        for n, (ours, theirs) in enumerate(pairs)
    ]


def prefers_right(prompt: str) -> str:
    a = prompt.split("Answer A:\n")[1].split("\n\nAnswer B:")[0]
    b = prompt.split("Answer B:\n")[1].split("\n\nReply")[0]
    return "TIE" if (a == "right") == (b == "right") else "A" if a == "right" else " b."


def test_the_better_answer_wins_wherever_it_stands(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.rule = prefers_right
    cache = tmp_path / "not" / "there" / "yet.jsonl"
    pairs = [("right", "wrong")] * 3 + [("wrong", "right"), ("wrong", "worse"), ("same", "same")]
    found = ask(endpoint, cache, rows_of(*pairs))
    assert found["value"] == pytest.approx((3 + 0 + 0.5 + 0.5) / 6)
    assert found["ci_low"] < found["value"] < found["ci_high"]
    assert (found["n"], found["undecided"], found["model"]) == (6, 2, "wise")
    assert len(endpoint.asked) == 10  # twice each, but for equal answers
    assert all(body["temperature"] == 0 and body["model"] == "wise" for body in endpoint.asked)
    assert endpoint.keys == [None] * 10


def test_a_judge_that_goes_by_the_place_counts_for_nothing(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.rule = lambda prompt: "A"
    found = ask(endpoint, tmp_path / "judge.jsonl", rows_of(*[("x", "y")] * 4))
    assert (found["value"], found["undecided"]) == (0.5, 4)


def test_nothing_is_asked_twice(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_JUDGE_KEY", "secret")
    endpoint.rule = prefers_right
    rows, cache = rows_of(("right", "wrong"), ("wrong", "right")), tmp_path / "judge.jsonl"
    first = ask(endpoint, cache, rows)
    assert len(endpoint.asked) == 4
    assert set(endpoint.keys) == {"Bearer secret"}
    assert "secret" not in cache.read_text()
    assert ask(endpoint, cache, rows) == first
    assert len(endpoint.asked) == 4
    ask(endpoint, cache, rows, question="Which is shorter?")
    assert len(endpoint.asked) == 8
    ask(endpoint, cache, rows_of(("a", "b"), ("c", "d")), rows=1)
    assert len(endpoint.asked) == 10


def test_failures_are_tried_again_and_refusals_are_told(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "WAIT_S", 0.01)
    monkeypatch.setattr(judge, "AT_ONCE", 1)
    endpoint.rule = prefers_right
    endpoint.failures = [503, 429]
    assert ask(endpoint, tmp_path / "a", rows_of(("right", "wrong")))["value"] == 1
    endpoint.failures = [401]
    with pytest.raises(UserError, match="refuses: 401"):
        ask(endpoint, tmp_path / "b", rows_of(("right", "wrong")))
    endpoint.failures = [500] * 20
    with pytest.raises(UserError, match="does not answer after 4 attempts: 500"):
        ask(endpoint, tmp_path / "c", rows_of(("right", "wrong")))
    endpoint.failures = []
    endpoint.rule = lambda prompt: "Both have their merits."
    with pytest.raises(UserError, match="should reply A, B or TIE, but did not in 2 of 2"):
        ask(endpoint, tmp_path / "d", rows_of(("right", "wrong")))
    endpoint.rule = prefers_right  # what could not be read is asked again
    assert ask(endpoint, tmp_path / "d", rows_of(("right", "wrong")))["value"] == 1
    endpoint.url = "http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match="does not answer after 4 attempts"):
        ask(endpoint, tmp_path / "e", rows_of(("right", "wrong")))
