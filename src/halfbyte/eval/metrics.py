"""Owns scoring an answer against the wanted one, as a number from 0 to 1 for each row."""

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
    """Return a metric's function (answer, wanted) → score.

    Args:
        metric: the name of an answer metric in ``eval.metrics``.
        settings: has ``answer_pattern`` for ``exact_match`` and ``json_schema`` for ``schema_valid``.

    Raises:
        UserError: the metric needs a library that is not installed, or the schema cannot be read.
    """
    if metric == "exact_match":
        return lambda answer, wanted: exact_match(answer, wanted, settings.answer_pattern)
    if metric == "schema_valid":
        return _schema_valid(Path(settings.json_schema or ""))
    return LIBRARIES[metric]() if metric in LIBRARIES else PLAIN[metric]


def normalised_match(answer: str, wanted: str) -> float:
    """Return 1 if both have the same words in any script, ignoring case, punctuation, width and spaces."""
    if not _words(wanted):  # only symbols, such as + or 👍
        return exact_match(answer, wanted)
    return float(_words(answer) == _words(wanted))


def numeric_match(answer: str, wanted: str) -> float:
    """Return 1 if the last numbers of both agree to 9 digits; an answer without a number is wrong."""
    number, wanted_number = last_number(answer), last_number(wanted)
    if number is None or wanted_number is None:
        return 0.0
    return float(math.isclose(number, wanted_number, rel_tol=1e-9))


def last_number(text: str) -> float | None:
    """Return the last number of a text (``1,234.5``, ``-3``, ``6.02e23``, digits of any script), or None."""
    numbers = NUMBER.findall(unicodedata.normalize("NFKC", text).translate(ARABIC_MARKS))
    return float(numbers[-1].replace(",", "")) if numbers else None


def exact_match(answer: str, wanted: str, pattern: str | None = None) -> float:
    """Return 1 if both are the same text; case and outer spaces do not count.

    With a pattern, its last matches are compared instead. An answer that it does not match is wrong.
    """
    if pattern is None:
        return float(_folded(answer) == _folded(wanted))
    match, wanted_match = extract(answer, pattern), extract(wanted, pattern)
    return float(match is not None and match == wanted_match)


def extract(text: str, pattern: str) -> str | None:
    """Return the group of the pattern's last match, or None."""
    groups = [match.group(1) for match in re.finditer(pattern, text)]
    return groups[-1] if groups else None


def field_match(answer: str, wanted: str) -> float:
    """Return the share of the wanted JSON object's fields that the answer has with an equal value.

    The answer's first ``{…}`` is taken. An answer without a JSON object scores 0; fields that are not
    wanted count against it, as further fields that do not match.
    """
    wanted_fields = _json_object(wanted)
    if wanted_fields is None:
        return 0.0
    fields = _json_object(answer)
    if fields is None:
        return 0.0
    names = set(wanted_fields) | set(fields)
    if not names:
        return 1.0
    same = [
        name in wanted_fields and name in fields and _same(wanted_fields[name], fields[name])
        for name in names
    ]
    return sum(same) / len(names)


def _json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object at the first ``{`` of a text, or None."""
    value = _json_from(text, text.find("{"))
    return value if isinstance(value, dict) else None


def _json_from(text: str, start: int) -> Any:
    """Return the JSON value that begins at ``start``, or ``NO_JSON``."""
    if start < 0:
        return NO_JSON
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0]
    except (ValueError, RecursionError):
        return NO_JSON


def _schema_valid(path: Path) -> Score:
    """Score 1 if the answer's first JSON object or array conforms to the schema; ``wanted`` is not used."""
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
    """Return the words of a text in normal form, separated by single spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(
        "".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in plain).split()
    )


def _same(ours: Any, theirs: Any) -> bool:
    """Return whether two values are equal as JSON, where 1 equals 1.0 but true does not equal 1."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def _folded(text: str) -> str:
    """Fold the case of a text and reduce each run of spaces to one."""
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
    """Splits text of any script into words with their case folded."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words, as rouge_score calls it."""
        return re.findall(r"\w+", text.casefold())


@lru_cache(maxsize=1)
def _rouge_l() -> Score:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            "eval.metrics: rouge_l needs rouge-score: pip install 'halfbyte[metrics]'"
        ) from None
    # The library's own tokenizer keeps only a-z and 0-9, so other scripts would score 0.
    metric = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, wanted: float(metric.score(wanted, answer)["rougeL"].fmeasure)


PLAIN: dict[str, Score] = {
    "normalised_match": normalised_match,
    "numeric_match": numeric_match,
    "field_match": field_match,
}
LIBRARIES: dict[str, Callable[[], Score]] = {"chrf": _chrf, "bleu": _bleu, "rouge_l": _rouge_l}
