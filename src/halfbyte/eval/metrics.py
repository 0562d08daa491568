"""Owns scoring: an answer against the wanted one, as a number from 0 to 1 for each row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from halfbyte.errors import UserError

Score = Callable[[str, str], float]


def scorer(metric: str, answer_pattern: str | None) -> Score:
    """A function (answer, wanted) → score.

    Args:
        metric: a name of ``eval.metrics``.
        answer_pattern: for ``exact_match``: a regular expression with one group.

    Raises:
        UserError: the metric needs a library that is not installed.
    """
    if metric == "exact_match":
        return lambda answer, wanted: exact_match(answer, wanted, answer_pattern)
    if metric == "field_match":
        return field_match
    if metric == "chrf":
        return _chrf()
    return _rouge_l()


def exact_match(answer: str, wanted: str, pattern: str | None = None) -> float:
    """1 if both are the same text, case and outer spaces aside; with a pattern, if its last matches are.

    An answer in which the pattern matches nothing is wrong.
    """
    if pattern is None:
        return float(_folded(answer) == _folded(wanted))
    found, needed = extract(answer, pattern), extract(wanted, pattern)
    return float(found is not None and found == needed)


def extract(text: str, pattern: str) -> str | None:
    """The group of the pattern's last match, or None."""
    found = [match.group(1) for match in re.finditer(pattern, text)]
    return found[-1] if found else None


def field_match(answer: str, wanted: str) -> float:
    """Share of the wanted JSON object's fields that the answer has with an equal value.

    The answer's first ``{…}`` counts. An answer that is no JSON object scores 0; fields that nobody
    asked for count against it, as further fields that do not match.
    """
    needed = _json_object(wanted)
    if needed is None:
        return 0.0
    found = _json_object(answer)
    if found is None:
        return 0.0
    names = set(needed) | set(found)
    if not names:
        return 1.0
    same = [name in needed and name in found and _same(needed[name], found[name]) for name in names]
    return sum(same) / len(names)


def _json_object(text: str) -> dict[str, Any] | None:
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text[start:])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _same(ours: Any, theirs: Any) -> bool:
    """Equal as JSON: true is not 1, though 1 is 1.0."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


@lru_cache(maxsize=1)
def _chrf() -> Score:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise UserError(
            "eval.metrics: chrf needs sacrebleu: pip install 'halfbyte[metrics]'"
        ) from None
    metric = CHRF()  # character 6-grams, beta 2 (Popović 2015)
    return lambda answer, wanted: float(metric.sentence_score(answer, [wanted]).score) / 100


class _Words:
    """Words of any script, lower-cased."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


@lru_cache(maxsize=1)
def _rouge_l() -> Score:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            "eval.metrics: rouge_l needs rouge-score: pip install 'halfbyte[metrics]'"
        ) from None
    # The library's own tokenizer knows a-z and 0-9 alone: other scripts would score 0.
    metric = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, wanted: float(metric.score(wanted, answer)["rougeL"].fmeasure)
