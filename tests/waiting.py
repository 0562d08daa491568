"""Waiting for a condition, with a deadline: the one place where tests let time pass."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 0.02


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll until ``condition`` holds; fail with ``what`` once ``seconds`` have passed."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"after {seconds} s: {what}"
        time.sleep(POLL_S)
