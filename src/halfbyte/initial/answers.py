"""Owns which metric fits answers, by their shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

MIN_SHARE = 0.9  # of the answers that have a shape
MAX_LABELS = 200  # distinct answers of a closed set
MIN_REPEATS = 4  # rows for each of them
MAX_LABEL_CHARS = 80
MAX_SHORT_CHARS = 40  # of answers that are to be the same word for word
FINAL = r"####\s*(\S.*)"  # as in GSM8K
NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,.' ]*(?:[%\w]{0,4})?")


@dataclass(frozen=True)
class Goal:
    """What answers are measured by.

    Attributes:
        shape: of the answers, in words.
        metrics: as ``eval.metrics``; empty: the default, which also compares tool calls.
        pattern: as ``eval.answer_pattern``.
    """

    shape: str
    metrics: list[str]
    pattern: str | None = None


def goal_of(answers: list[str], *, calls: int = 0, texts: int = 0) -> Goal:
    """Return the metric for answers.

    Args:
        answers: the last answer of each row.
        calls: number of rows whose answers call tools.
        texts: number of rows that are raw text.
    """
    stripped = [answer.strip() for answer in answers]
    if texts:
        return Goal("raw text", ["held_out_loss"])
    if calls:
        return Goal(f"tool calls in {calls} of {len(answers)} rows", ["tool_match", "tool_valid"])
    return next(goal for fits, goal in _goals(stripped) if fits)


def _goals(answers: list[str]) -> Iterator[tuple[bool, Goal]]:
    """Yield each shape that answers may have, the narrowest first, and whether they have it."""
    distinct, longest = len(set(answers)), max(map(len, answers))
    usual = sorted(map(len, answers))[len(answers) * 9 // 10]
    few = distinct <= min(MAX_LABELS, max(2, len(answers) // MIN_REPEATS))
    yield _share(answers, _is_json), Goal("JSON", ["exact_match", "field_match"])
    has_result = _share(answers, re.compile(FINAL).search)
    yield has_result, Goal("a result after ####", ["exact_match"], FINAL)
    is_number = _share(answers, NUMBER.fullmatch) and distinct > 2
    yield is_number, Goal("one number", ["numeric_match"])
    is_label = few and longest <= MAX_LABEL_CHARS
    yield is_label, Goal(f"one of {distinct} labels", ["exact_match"])
    yield usual <= MAX_SHORT_CHARS, Goal("a few words", ["exact_match", "normalised_match"])
    rouge = ["rouge_l"] if find_spec("rouge_score") is not None else []
    yield True, Goal("free text", [*rouge, "held_out_loss"])


def _share(texts: list[str], has_shape: Callable[[str], object]) -> bool:
    return sum(bool(has_shape(text)) for text in texts) >= MIN_SHARE * len(texts)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
