"""Owns which metric fits answers, by their shape."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

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
    if texts:
        return Goal("raw text", ["held_out_loss"])
    if calls:
        return Goal(f"tool calls in {calls} of {len(answers)} rows", ["tool_match", "tool_valid"])
    stripped = [answer.strip() for answer in answers]
    number = len(stripped)
    distinct = len(set(stripped))
    longest = max(map(len, stripped), default=0)
    if _share(stripped, lambda text: isinstance(_json(text), dict | list)):
        return Goal("JSON", ["exact_match", "field_match"])
    if _share(stripped, lambda text: re.search(FINAL, text) is not None):
        return Goal("a result after ####", ["exact_match"], FINAL)
    if _share(stripped, lambda text: NUMBER.fullmatch(text) is not None) and distinct > 2:
        return Goal("one number", ["numeric_match"])
    if distinct <= min(MAX_LABELS, max(2, number // MIN_REPEATS)) and longest <= MAX_LABEL_CHARS:
        return Goal(f"one of {distinct} labels", ["exact_match"])
    if sorted(map(len, stripped))[number * 9 // 10] <= MAX_SHORT_CHARS:
        return Goal("a few words", ["exact_match", "normalised_match"])
    if find_spec("rouge_score") is not None:
        return Goal("free text", ["rouge_l", "held_out_loss"])
    return Goal("free text", ["held_out_loss"])


def majority(answers: list[str]) -> float:
    """Return the share of the most frequent answer, which a tuned model must beat."""
    return max(Counter(answer.strip() for answer in answers).values()) / len(answers)


def _share(texts: list[str], has_shape: Any) -> bool:
    return bool(texts) and sum(map(has_shape, texts)) >= MIN_SHARE * len(texts)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
