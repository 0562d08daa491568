r"""Owns reading the number that an answer gives, in the notations of several languages, or why it gives none.

Digits of every script count. A number may have a sign, groups of digits (1,234 · 1.234.567 · 1 234 · 1'234 ·
1,00,000), a decimal point or comma, an exponent (1.5e3 · 1.5 × 10^3 · 10⁶), a scale in words (2,5 Mio.), or be a
fraction (3/4 · 2 1/2 · ½ · \frac{3}{4}). Units, currencies and percent signs beside it do not count.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

MAX_DIGITS = 400
MAX_EXPONENT = 400
MAX_POWER_DIGITS = 4000  # of a power that is computed
CONTEXT_CHARS = 12  # before a number, in which its sign stands
MINUS = "-\u2212\u2010\u2011\ufe63\uff0d"
SPACES = "\u00a0\u202f\u2009\u2007"  # within a number, besides the plain one
APOSTROPHES = "\u2019\u02bc"
SIGNS = {
    0x066B: ".",
    0x066C: "'",
    0x066A: "%",
    0x060C: ",",
}  # Arabic decimal, thousands, percent, comma
SIGNS |= {ord(c): "-" for c in MINUS} | {ord(c): " " for c in SPACES}
SIGNS |= {ord(c): "'" for c in APOSTROPHES}
RAISED = {ord(c): str(n) for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {0x207B: "-", 0x207A: "+"}
# What comes before the answer of a text; the last of them counts.
MARKERS = re.compile(
    r"####|\\boxed\{|=|(?:\b(?:answer|result|total|sum|antwort|ergebnis|lösung|réponse|résultat|respuesta"
    r"|resultado|cevap|sonuç)|उत्तर|الجواب|الإجابة|پاسخ|جواب)\b\s*(?:is|are|ist|lautet|est|es|है|هو|هي|است)?\s*:?",
    re.IGNORECASE,
)
FRACTION = r"\\[dt]?frac\{\s*(?P<top>\d+)\s*\}\{\s*(?P<bottom>\d+)\s*\}"
PLAIN = r"(?P<plain>(?:\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:[.,']\d+)*|[.,]\d+)"
PART = r"(?:\s?(?P<part_top>\d+)/(?P<part_bottom>\d+)|/(?P<under>\d+))?"  # of a mixed number, or of a fraction
POWER = r"(?:(?P<ten>[eE]|\s*[×x*·]\s*10\s*(?:\^|\*\*)\s*\{?)|\s*(?:\^|\*\*)\s*\{?)"
EXPONENT = rf"(?:{POWER}(?P<exponent>[+-]?\d+)\}}?(?![\w.]{{0,40}}\d))?"
NUMBER = re.compile(rf"{FRACTION}|{PLAIN}{PART}{EXPONENT}")
WORD_REST = re.compile(r"\w*")
RANGE = re.compile(r"\d\s?[-–]\s?$|\d\s+(?:to|bis|à)\s+$")
NEGATIVE = re.compile(r"(?:^|[^\w)\]%])-\s?[^\w\s]?$")  # "-5" and "-$5", not "10-15"
MONTHS = (
    "jan(?:uary|uar|vier)?|feb(?:ruary|ruar)?|fév(?:rier)?|mar(?:ch|s)?|märz|apr(?:il)?|avril|mai|may|june?|juni|juin"
    "|july?|juli|juillet|aug(?:ust)?|août|sep(?:t|tember|tembre)?|o[ck]t(?:ober|obre)?|nov(?:ember|embre)?"
    "|de[cz](?:ember)?|déc(?:embre)?"
)
NO_NUMBERS = {
    "time": re.compile(r"\b\d{1,2}:\d{2}(?::\d{2})?\b"),
    "date": re.compile(
        r"\b\d{4}-\d{1,2}-\d{1,2}\b|\b\d{1,2}([./-])\d{1,2}\1(?:\d{4}|\d{2})\b"
        rf"|\b\d{{1,2}}(?:st|nd|rd|th|\.)?\s+(?:of\s+)?(?:{MONTHS})\b\.?(?:,?\s+\d{{4}})?"
        rf"|\b(?:{MONTHS})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s+\d{{4}})?",
        re.IGNORECASE,
    ),
    # But groups of three: 1.234.567
    "version": re.compile(
        r"\b[vV]\.?\s?\d+(?:\.\d+)+|\b(?!\d{1,3}(?:\.\d{3})+\b)\d+(?:\.\d+){2,}\b"
    ),
    "ratio": re.compile(r"\b\d+:\d+\b"),
}
SCALES = {
    **dict.fromkeys(("thousand", "tausend", "bin"), 3),
    **dict.fromkeys(("lakh", "lakhs", "लाख"), 5),
    **dict.fromkeys(("million", "millions", "millionen", "mio", "milyon", "مليون", "میلیون"), 6),
    **dict.fromkeys(("crore", "crores", "करोड़"), 7),
    **dict.fromkeys(("billion", "billions", "milliarde", "milliarden", "milliard", "milliards"), 9),
    **dict.fromkeys(("mrd", "milyar"), 9),
    "trillion": 12,
}
SCALE = re.compile(r"\s*([^\W\d_]+)")


@dataclass(frozen=True)
class Reading:
    """What a text gives: its number, or why none can be read off it.

    Attributes:
        value: the number.
        fault: where there is none, ``none``, ``several``, ``date``, ``time``, ``version``, ``ratio``, ``formula`` or
            ``notation``.
    """

    value: Fraction | None
    fault: str = ""


def read_number(text: str) -> Reading:
    r"""Return the number that an answer gives.

    Behind the last ``####``, ``\boxed``, ``=`` or "answer is" it is the next number; else the text must hold
    one number alone, or several of one value. A range gives its end.
    """
    text = _plain(text)
    placed = _readings(text)
    starts = [start for start, _ in placed]
    for marker in reversed(list(MARKERS.finditer(text))):
        following = bisect_left(starts, marker.end())
        if following < len(placed):
            return placed[following][1]
    readings = {reading for _, reading in placed}
    if len(readings) > 1:
        return Reading(None, "several")
    return placed[0][1] if placed else Reading(None, "none")


def same_number(ours: Reading, theirs: Reading) -> bool:
    """Return whether both are numbers that agree to 9 digits."""
    if ours.value is None or theirs.value is None:
        return False
    return abs(ours.value - theirs.value) <= max(abs(ours.value), abs(theirs.value)) / 10**9


def _plain(text: str) -> str:
    """Return a text with ASCII digits and signs, and with exponents and vulgar fractions written out."""
    text = unicodedata.normalize("NFC", text).translate(SIGNS)
    # A raised or lowered digit behind a letter belongs to a unit or a formula; behind a digit it is an exponent.
    text = re.sub(r"(?<=[^\W\d_])[⁰¹²³⁴-⁹⁻⁺₀-₉]+", "", text)
    text = re.sub(
        r"(?<=\d)[⁻⁺]?[⁰¹²³⁴-⁹]+", lambda match: f"^{match.group().translate(RAISED)}", text
    )
    parts: list[str] = []
    for char in text:
        if char.isdecimal():
            parts.append(str(unicodedata.decimal(char)))
        elif unicodedata.category(char) == "No" and "/" in _compatible(char):  # ½
            behind_digit = bool(parts) and parts[-1].isdigit()
            parts.append(" " * behind_digit + _compatible(char))
        else:
            parts.append(char)
    text = "".join(parts).replace("\\,", "").replace("\\!", "").replace("{,}", ",")
    return re.sub(r"(?<=\d)\s*[–—]\s*(?=\d)", "–", text)


def _compatible(char: str) -> str:
    return unicodedata.normalize("NFKC", char).replace("\u2044", "/")


def _readings(text: str) -> list[tuple[int, Reading]]:
    """Return what each number-like part of a text gives and where it begins, in order."""
    placed: list[tuple[int, Reading]] = []
    for fault, pattern in NO_NUMBERS.items():

        def blank(match: re.Match[str], fault: str = fault) -> str:
            placed.append((match.start(), Reading(None, fault)))
            return " " * len(match.group())

        text = pattern.sub(blank, text)
    at, last = 0, None
    while number := NUMBER.search(text, at):
        start = number.start()
        before, at = text[max(0, start - CONTEXT_CHARS) : start], number.end()
        if before[-1:].isalpha() or before[-1:] == "_":  # H2O, x1
            placed.append((start, Reading(None, "formula")))
            rest = WORD_REST.match(text, at)
            at, last = rest.end() if rest else at, None
            continue
        value = _value(number)
        scale = SCALE.match(text, at)
        if value is not None and scale and scale.group(1).casefold() in SCALES:
            value *= 10 ** SCALES[scale.group(1).casefold()]
        if RANGE.search(before) and last is not None:
            placed.pop()
        elif value is not None and NEGATIVE.search(before):
            value = -value
        placed.append((start, Reading(value, "" if value is not None else "notation")))
        last = value
    return sorted(placed, key=lambda pair: pair[0])


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of ``NUMBER``; None if no notation is like it, or it is too large."""
    if max(len(group or "") for group in match.groups()) > MAX_DIGITS:
        return None
    groups = {name: group for name, group in match.groupdict().items() if group is not None}
    try:
        if "top" in groups:
            return Fraction(int(groups["top"]), int(groups["bottom"]))
        value = _grouped(groups["plain"]) / int(groups.get("under", 1))
        if "part_top" in groups:
            value += Fraction(int(groups["part_top"]), int(groups["part_bottom"]))
        exponent = int(groups.get("exponent", 0))
        if abs(exponent) > MAX_EXPONENT or len(match.group()) * abs(exponent) > MAX_POWER_DIGITS * (
            100 if "ten" in groups else 1
        ):
            return None
        if "exponent" in groups:
            value = value * Fraction(10) ** exponent if "ten" in groups else value**exponent
    except (ValueError, ZeroDivisionError):
        return None
    return value


def _grouped(digits: str) -> Fraction:
    """Return the value of digits with marks between them.

    Raises:
        ValueError: no notation groups digits so.
    """
    decimal = _decimal_mark(digits)
    whole, _, rest = digits.partition(decimal) if decimal else (digits, "", "")
    first, *groups = re.split(r"[.,' ]", whole)
    if groups:
        marks = set(whole) - set("0123456789")
        sizes = [len(group) for group in groups]
        western = len(first) <= 3 and set(sizes) == {3}
        indian = "," in marks and len(first) <= 2 and sizes[-1] == 3 and set(sizes[:-1]) <= {2}
        if len(marks) > 1 or not (western or indian):
            raise ValueError(digits)
    return Fraction(f"{''.join(chain([first], groups)) or '0'}.{rest or '0'}")


def _decimal_mark(digits: str) -> str:
    """Return the mark between whole and rest, "" if there is none: a last point or comma that groups nothing.

    ``1,234`` is a thousand, and ``1.234`` is not.
    """
    marks = [char for char in digits if not char.isdigit()]
    if not marks or marks[-1] not in ".,":
        return ""
    last, kinds = marks[-1], len(set(marks))
    if digits[0] == last or (kinds > 1 and marks.count(last) == 1):
        return last
    first, _, rest = digits.rpartition(last)
    is_group = last == "," and len(rest) == 3 and len(first) <= 3 and not first.startswith("0")
    return last if marks.count(last) == 1 and kinds == 1 and not is_group else ""
