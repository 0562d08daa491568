"""A page in a real browser, at the width of a phone and of a desktop, with its requests and its errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

SIZES = {"phone": (390, 844), "desktop": (1280, 800)}


@dataclass
class Opened:
    """A page that is open.

    Attributes:
        page: Playwright's.
        requests: addresses that it requested.
        failed: exceptions in its scripts.
        console: errors on the console, such as a reply of 503.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


def find_browser(environment: Mapping[str, str]) -> str:
    """The path of a Chromium; without one the test is skipped, or fails where ``CI`` is true."""
    path = environment.get("CHROMIUM")
    for name in ("chromium", "google-chrome"):
        path = path or shutil.which(name, path=environment.get("PATH"))
    if path is None:
        missing = "no browser: CHROMIUM names none, none is on the PATH (apt-get install chromium)"
        (pytest.fail if environment.get("CI") == "true" else pytest.skip)(missing)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    from playwright import sync_api

    path = find_browser(os.environ)
    with sync_api.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(params=SIZES)
def opened(request: pytest.FixtureRequest, browser: Any) -> Iterator[Opened]:
    """A page that goes nowhere yet."""
    width, height = SIZES[request.param]
    opened = Opened(browser.new_page(viewport={"width": width, "height": height}))
    page = opened.page
    page.on("request", lambda sent: opened.requests.append(sent.url))
    page.on("pageerror", lambda error: opened.failed.append(str(error)))
    page.on(
        "console", lambda line: opened.console.append(line.text) if line.type == "error" else None
    )
    yield opened
    page.close()
