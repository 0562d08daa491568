"""Owns scoring: an answer against the wanted one, as a number from 0 to 1 for each row."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from halfbyte.config.evaluation import Eval
from halfbyte.errors import UserError

Score = Callable[[str, str], float]
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?")
ARABIC_MARKS = {0x066B: ".", 0x066C: ",", 0x2212: "-"}  # decimal, thousands, the minus sign
NO_JSON = object()


def scorer(metric: str, settings: Eval) -> Score:
    """A function (answer, wanted) → score.

    Args:
        metric: a name of ``eval.metrics`` that scores answers.
        settings: with ``answer_pattern`` for ``exact_match`` and ``json_schema`` for ``schema_valid``.

    Raises:
        UserError: the metric needs a library that is not installed, or the schema cannot be read.
    """
    if metric == "exact_match":
        return lambda answer, wanted: exact_match(answer, wanted, settings.answer_pattern)
    if metric == "schema_valid":
        return _schema_valid(Path(settings.json_schema or ""))
    return LIBRARIES[metric]() if metric in LIBRARIES else PLAIN[metric]


def normalised_match(answer: str, wanted: str) -> float:
    """1 if both are the same words: case, punctuation, width and spaces aside, in any script."""
    if not _words(wanted):  # signs alone, such as + or 👍
        return exact_match(answer, wanted)
    return float(_words(answer) == _words(wanted))


def numeric_match(answer: str, wanted: str) -> float:
    """1 if the last number in both is the same, to 9 digits; an answer without a number is wrong."""
    found, needed = last_number(answer), last_number(wanted)
    if found is None or needed is None:
        return 0.0
    return float(math.isclose(found, needed, rel_tol=1e-9))


def last_number(text: str) -> float | None:
    """The last number of a text: ``1,234.5``, ``-3``, ``6.02e23``, digits of any script; else None."""
    found = NUMBER.findall(unicodedata.normalize("NFKC", text).translate(ARABIC_MARKS))
    return float(found[-1].replace(",", "")) if found else None


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
    value = _json_from(text, text.find("{"))
    return value if isinstance(value, dict) else None


def _json_from(text: str, start: int) -> Any:
    """The JSON value that begins there, or ``NO_JSON``."""
    if start < 0:
        return NO_JSON
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0]
    except (ValueError, RecursionError):
        return NO_JSON


def _schema_valid(path: Path) -> Score:
    """1 where the answer's first object or array is JSON that keeps to the schema; ``wanted`` is not read."""
    try:
        from jsonschema import Draft202012Validator, SchemaError
    except ImportError:
        raise UserError(
            "eval.metrics: schema_valid needs jsonschema: pip install 'halfbyte[metrics]'"
        ) from None
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        Draft202012Validator.check_schema(schema)
    except (OSError, ValueError, SchemaError) as error:
        raise UserError(f"eval.json_schema: {path}: {error}") from None
    validator = Draft202012Validator(schema)

    def score(answer: str, wanted: str) -> float:
        starts = [at for at in (answer.find("{"), answer.find("[")) if at >= 0]
        value = _json_from(answer, min(starts, default=-1))
        return float(value is not NO_JSON and validator.is_valid(value))

    return score


def _words(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(
        "".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in plain).split()
    )


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


@lru_cache(maxsize=1)
def _bleu() -> Score:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise UserError(
            "eval.metrics: bleu needs sacrebleu: pip install 'halfbyte[metrics]'"
        ) from None
    metric = BLEU(effective_order=True)  # as sacreBLEU advises for single sentences
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


PLAIN: dict[str, Score] = {
    "normalised_match": normalised_match,
    "numeric_match": numeric_match,
    "field_match": field_match,
}
LIBRARIES: dict[str, Callable[[], Score]] = {"chrf": _chrf, "bleu": _bleu, "rouge_l": _rouge_l}
