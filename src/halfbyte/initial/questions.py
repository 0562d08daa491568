"""Owns the questions of init: at most five, each with what is proposed."""

from __future__ import annotations

import sys
from collections.abc import Callable

MAX_QUESTIONS = 5


class Questions:
    """Puts questions to the user, or takes what is proposed.

    Args:
        asks: whether there is somebody to answer.
        read: reads a line of answer.
    """

    def __init__(self, *, asks: bool, read: Callable[[str], str] = input) -> None:
        self.asks = asks
        self.number = 0
        self._read = read

    def __call__(self, question: str, proposed: str) -> str:
        """Return the answer to a question; an empty one is what is proposed."""
        if not self.asks:
            return proposed
        self.number += 1
        assert self.number <= MAX_QUESTIONS
        return self._read(f"{question} [{proposed}]: ").strip() or proposed

    def say(self, text: str) -> None:
        """Print a line beside the questions, for people."""
        print(text, file=sys.stderr)
