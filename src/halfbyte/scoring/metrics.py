"""Owns scoring an answer against the wanted one, as a number from 0 to 1 for each row."""

from __future__ import annotations

import contextlib
import json
import math
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from halfbyte.config.evaluation import Eval
from halfbyte.data.fields import JSON
from halfbyte.errors import UserError
from halfbyte.scoring.numbers import read_number, same_number

Score = Callable[[str, str], float]
# Changes with what counts as right: scores of different versions are not comparable.
VERSION = 2
NO_JSON = object()
MAX_BRACKETS = 200  # at which a JSON value is looked for in an answer
DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")
# What carries meaning beside words: a sign, marks within a number, C++ and C#, a grade's minus, percent, degrees,
# a factorial, and what stands between two operands.
MEANT = re.compile(
    r"(?<!\w)[-+](?=[$€£¥₹₺]?\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)[.,:/](?=\d)|(?<=\w)[+#]+(?!\w)|(?<=\b[a-z])-(?!\w)"
    r"|[%‰°√∞]|(?<=\d)!(?=\s*=)|(?<=[\w)])\s?[<>≤≥≠=+*/^×÷∈∉]\s?(?=[\w(-])|[≤≥<>](?=\s?\d)"
)
RAISED = {ord(char): f"^{digit}" for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
BESIDE = re.compile(r"(?<=\d)\s+(?=[%‰°€$£¥₹₺])|(?<=[€$£¥₹₺])\s+(?=\d)")  # space that says nothing


def scorer(metric: str, settings: Eval) -> Score:
    """Return a metric's function (answer, wanted) → score, of texts without thoughts and calls.

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
    """Return 1 if both have the same words in any script, ignoring case, width, spaces, and punctuation.

    What carries meaning counts: ``-5``, ``3.5``, ``C++``, ``50%``, ``$``.
    """
    if not _words(wanted):  # only symbols, such as + or 👍
        return exact_match(answer, wanted)
    return float(_words(answer) == _words(wanted))


def numeric_match(answer: str, wanted: str) -> float:
    """Return 1 if both give the same number, to 9 digits; an answer that gives none, or several, is wrong."""
    return float(same_number(read_number(answer), read_number(wanted)))


def exact_match(answer: str, wanted: str, pattern: str | None = None) -> float:
    """Return 1 if both are the same text in Unicode's form NFC; outer white space does not count.

    With a pattern, its last matches are compared instead. An answer that it does not match is wrong.
    """
    if pattern is None:
        return float(_composed(answer) == _composed(wanted))
    match, wanted_match = extract(answer, pattern), extract(wanted, pattern)
    return float(match is not None and match == wanted_match)


def extract(text: str, pattern: str) -> str | None:
    """Return the group of the pattern's last match, or None."""
    groups = [match.group(1) for match in re.finditer(pattern, text)]
    return groups[-1] if groups else None


def field_match(answer: str, wanted: str) -> float:
    """Return the share of the wanted JSON object's fields that the answer has with an equal value.

    The first object in the answer's text is taken that is whole. An answer without one scores 0; fields that
    are not wanted count against it, as further fields that do not match. Values are equal as JSON: null is
    a value, so that a missing field is not null; 1 equals 1.0 and numbers agree to 9 digits; true is not 1, and
    "1" is not 1.
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
    with contextlib.suppress(RecursionError):  # nothing that is wanted is nested so deeply
        same = [
            name in wanted_fields
            and name in fields
            and same_json(wanted_fields[name], fields[name])
            for name in names
        ]
        return sum(same) / len(names)
    return 0.0


def _json_object(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, or None."""
    value = _first_json(text, "{")
    return value if isinstance(value, dict) else None


def _first_json(text: str, opening: str) -> Any:
    """Return the first JSON value of a text that begins with one of these brackets, or ``NO_JSON``."""
    for match in islice(re.finditer(f"[{re.escape(opening)}]", text), MAX_BRACKETS):
        with contextlib.suppress(ValueError, RecursionError):
            return JSON.raw_decode(text, match.start())[0]
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
        value = _first_json(answer, "{[")
        return float(value is not NO_JSON and is_valid(validator, value))

    return score


def is_valid(validator: Any, value: Any) -> bool:
    """Return whether a value keeps to a schema; one that cannot be checked does not."""
    try:
        return bool(validator.is_valid(value))
    except (ArithmeticError, RecursionError, ValueError, LookupError):
        return False


def _words(text: str) -> str:
    """Return the words of a text in normal form, separated by single spaces."""
    text = "".join(char for char in text if unicodedata.category(char) != "Cf").translate(RAISED)
    plain = unicodedata.normalize("NFKC", text).casefold().translate(DASHES).replace("\u2044", "/")
    plain = BESIDE.sub("", plain)
    meant = {place for match in MEANT.finditer(plain) for place in range(*match.span())}
    return " ".join(
        "".join(
            char
            if place in meant
            or char.isalnum()
            or unicodedata.category(char) in ("Mn", "Mc", "Sc", "So")
            else " "
            for place, char in enumerate(plain)
        ).split()
    )


def same_json(ours: Any, theirs: Any) -> bool:
    """Return whether two values are equal as JSON, where 1 equals 1.0 but true does not equal 1.

    Whole numbers are equal to the last digit, others to 9; texts in Unicode's form NFC. A number that no float
    holds equals nothing.
    """
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same_json(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same_json, ours, theirs))
    if isinstance(ours, str) and isinstance(theirs, str):
        return unicodedata.normalize("NFC", ours) == unicodedata.normalize("NFC", theirs)
    if isinstance(ours, float) or isinstance(theirs, float):
        return _close(ours, theirs)
    return bool(ours == theirs)


def _close(ours: Any, theirs: Any) -> bool:
    """Return whether two numbers, one of them a float, agree to 9 digits; infinity equals nothing."""
    if not (isinstance(ours, int | float) and isinstance(theirs, int | float)):
        return False
    with contextlib.suppress(OverflowError):
        return math.isfinite(ours) and math.isclose(ours, theirs, rel_tol=1e-9)
    return False


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


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
