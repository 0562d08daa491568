"""A page in a real browser, at the width of a phone and of a desktop; with what it asked for and what failed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

SIZES = {"phone": (390, 844), "desktop": (1280, 800)}


@dataclass
class Opened:
    """A page that is open.

    Attributes:
        page: Playwright's.
        asked: addresses that it asked for.
        failed: exceptions in its scripts.
        console: what was written to the console as errors, such as a reply of 503.
    """

    page: Any
    asked: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser: CHROMIUM names none, none is on the PATH")
    with sync_api.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(params=SIZES)
def opened(request: pytest.FixtureRequest, browser: Any) -> Iterator[Opened]:
    """A page that goes nowhere yet."""
    width, height = SIZES[request.param]
    opened = Opened(browser.new_page(viewport={"width": width, "height": height}))
    page = opened.page
    page.on("request", lambda made: opened.asked.append(made.url))
    page.on("pageerror", lambda error: opened.failed.append(str(error)))
    page.on(
        "console", lambda told: opened.console.append(told.text) if told.type == "error" else None
    )
    yield opened
    page.close()
