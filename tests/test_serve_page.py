"""The page in a real browser: both answers stream, nothing is asked elsewhere, a phone is enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Opened
from serving import Process, serving
from waiting import wait_until

pytestmark = pytest.mark.real
KEY = "a-key-for-the-page"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, merged_run: Path) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("paged") / "log"
    options = ("--compute-dtype", "fp32", "--max-context", 512)
    with serving(log, f"tuned={merged_run}", *options, keys=KEY) as process:
        yield process


@pytest.fixture
def page(opened: Opened, server: Process) -> Iterator[Any]:
    """The page, open with its key; at the end nothing was asked elsewhere, and nothing failed."""
    page = opened.page
    page.goto(server.url)
    wait(page, "document.activeElement.id === 'key'")  # it asks for what is missing
    page.fill("#key", KEY)
    page.fill("#tokens", "40")
    page.press("#key", "Tab")
    wait(page, "document.querySelectorAll('select').length === 2")
    page.click("details summary")
    yield page
    assert not opened.failed
    assert opened.requests
    assert all(url.startswith((server.url, "data:")) for url in opened.requests)


def wait(page: Any, what: str) -> None:
    """Until an expression holds; playwright's own wait needs eval, which the page forbids."""
    wait_until(lambda: page.evaluate(what), what, 120)


def once(page: Any, what: str, then: str) -> Any:
    """What ``then`` gives as soon as an expression holds, both within the page."""
    return page.evaluate(
        "() => new Promise(done => { const timer = setInterval(() => {"
        f" if ({what}) {{ clearInterval(timer); done({then}); }} }}, 1); }})"
    )


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.click("#send")


DONE = "document.getElementById('send').textContent === 'Send'"
PIECES = "[...document.querySelectorAll('section')].map(s => s.querySelectorAll('.piece').length)"


def test_two_answers_stream_side_by_side(page: Any, tmp_path: Path) -> None:
    ask(page, "Acute myocardial infarction of the anterior wall")
    label = "document.getElementById('send').textContent"
    seen, said = once(page, f"Math.min(...{PIECES}) > 1", f"[{PIECES}, {label}]")
    assert said == "Stop"
    wait(page, DONE)
    whole = page.evaluate(PIECES)
    assert all(before < after for before, after in zip(seen, whole, strict=True))
    boxes = [section.bounding_box() for section in page.query_selector_all("section")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    answers = [turn.inner_text() for turn in page.query_selector_all(".turn.assistant")]
    assert len(answers) == len(set(answers)) == 2
    assert all(
        "max tokens" in figures.inner_text() for figures in page.query_selector_all(".figures")
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.hover("section:nth-child(2) .piece")
    tip = page.inner_text("#tip")
    assert tip.count("%") >= 5
    shares = [float(line.split()[-2]) for line in tip.splitlines() if line.endswith("%")]
    assert 0 < sum(shares[:5]) <= 100.3
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_right_to_left_text_is_shown_so(page: Any) -> None:
    ask(page, "ما هو التهاب عضلة القلب؟")
    wait(page, DONE)
    turns = ".turn.user"
    directions = page.evaluate(
        f"[...document.querySelectorAll('{turns}')].map(t => getComputedStyle(t).direction)"
    )
    assert directions == ["rtl", "rtl"]


def test_an_answer_can_be_stopped_and_a_new_chat_started(page: Any) -> None:
    page.click("details summary")
    page.fill("#tokens", "400")
    page.fill("#temperature", "2")
    ask(page, "Tell a very long story")
    once(page, f"Math.min(...{PIECES}) > 1", "document.getElementById('send').click()")
    wait(page, DONE)
    assert max(page.evaluate(PIECES)) < 400
    page.click("#new-chat")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0


def test_a_new_chat_during_an_answer_contains_nothing_of_it(page: Any) -> None:
    page.click("details summary")
    page.fill("#tokens", "400")
    page.fill("#temperature", "2")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.post_data or ""))
    ask(page, "Tell a very long story")
    once(page, f"Math.min(...{PIECES}) > 1", "document.getElementById('new-chat').click()")
    wait(page, DONE)
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    sent.clear()
    page.fill("#tokens", "4")
    ask(page, "Something else")
    wait(page, f"Math.min(...{PIECES}) > 0")
    wait(page, DONE)
    bodies = [json.loads(text) for text in sent if text]
    assert len(bodies) == 2
    for body in bodies:
        assert body["messages"] == [{"role": "user", "content": "Something else"}]


def test_an_error_is_told_and_the_question_stays_askable(page: Any) -> None:
    ask(page, "word " * 600)  # more than the context holds
    wait(page, "document.querySelectorAll('.turn.error').length === 2")
    assert "512" in page.inner_text(".turn.error")
    wait(page, DONE)
    ask(page, "Hello")
    wait(page, f"Math.min(...{PIECES}) > 0")
    wait(page, DONE)


@pytest.mark.slow
def test_thoughts_are_folded(opened: Opened, tool_run: Path, tmp_path: Path) -> None:
    options = ("--compute-dtype", "fp32", "--max-context", 512, "--slots", 2)
    with serving(tmp_path / "log", tool_run, *options) as process:
        page = opened.page
        page.goto(process.url)
        wait(page, "document.querySelectorAll('select').length === 2")
        ask(page, "Is Brest a port?")
        wait(page, DONE)
        turn = "[...document.querySelectorAll('.turn.assistant')].pop()"
        assert page.evaluate(f"{turn}.querySelector('details').open") is False
        assert (
            page.evaluate(f"{turn}.querySelector('details').textContent") == "ThoughtsIt is Brest."
        )
        assert page.evaluate(f"{turn}.innerText").strip().splitlines() == [
            "Thoughts",
            "Brest is a port.",
        ]
        page.screenshot(path=str(tmp_path / "page.png"))
        assert not opened.failed
