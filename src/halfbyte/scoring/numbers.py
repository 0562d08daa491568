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
CURRENCIES = "$€£¥₹₺₽₩฿"
# What comes before the answer of a text: the last of the first kind counts, else the last of the second.
BOXES = re.compile(r"####|\\boxed\{")
MARKERS = re.compile(
    r"=|\b(?:answer|result|total|sum|antwort|ergebnis|lösung|réponse|résultat|respuesta|resultado|cevap|sonuç)\b\s*"
    r"(?:(?:is|are|ist|lautet|est|es|:|=)\s*)+|(?:उत्तर|الجواب|الإجابة|پاسخ|جواب)\s*(?:है|هو|هي|است)?\s*:?\s*(?=[\W\d])",
    re.IGNORECASE,
)
PLAIN = r"(?P<plain>(?:\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:[.,']\d+)*|[.,]\d+)"
PART = r"(?:\s?(?P<part_top>\d+)/(?P<part_bottom>\d+)|/(?P<under>\d+))?"  # of a mixed number, or of a fraction
POWER = r"(?:(?P<ten>[eE]|\s*[×x*·]\s*10\s?(?:\^|\*\*)\s?\{?)|\s?(?:\^|\*\*)\s?\{?)"
EXPONENT = rf"(?:{POWER}(?P<exponent>[+-]?\d+)\}}?(?![\w.]{{0,40}}\d))?"
NUMBER = re.compile(rf"{PLAIN}{PART}{EXPONENT}")
WORD_REST = re.compile(r"\w*")
UNIT = r"(?:%|°C?|[A-Za-z]{1,4})?"
RANGE = re.compile(
    rf"\d\s?{UNIT}[-–][{CURRENCIES}]?$|\d\s?{UNIT}\s+(?:to|bis|à)\s+-?[{CURRENCIES}]?$"
)
# "-5", "-$5" and "-USD 5", but neither "10-15" nor "Total - 5" nor the bullet of a list.
NEGATIVE = re.compile(
    rf"(?:^|[^\w)\]%>-])-(?:[{CURRENCIES}]|[A-Za-z]{{2,3}}\.?\s?)?$|[=≈]\s?-\s?$|\b(?:minus|negative)\s$",
    re.IGNORECASE,
)
OPERATOR = re.compile(r"\s*(?:[×*+·÷]|x\s|[-–]\s|/\s)\s*[\d(]")
NAME = re.compile(r"[A-Za-zα-ωΑ-Ω](?:\^\{?[-+]?|-)?$")  # before a digit of H2O, x^2, COVID-19
UNIT_BETWEEN = re.compile(r"\s?[A-Za-z·/ ]{1,8}\^?\{?-?")  # 5 m^2
ROOT = re.compile(r"(?:√|\\sqrt\{?)\s?$")
SYMBOL = re.compile(r"\s?(?:π|√|\\pi|\\sqrt)")
MONTHS = (
    "jan(?:uary|uar|vier)?|feb(?:ruary|ruar)?|fév(?:rier)?|march|(?-i:Mar)|mars|märz|apr(?:il)?|avril|mai|(?-i:May)|june?|juni|juin"
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
    "address": re.compile(
        r"\b(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}\b|\b\d{3}-\d{3}-\d{4}\b"
    ),
    "version": re.compile(
        r"\b[vV]\.?\s?\d+(?:\.\d+)+|\b(?!\d{1,3}(?:\.\d{3})+\b)\d+(?:\.\d+){2,}\b"
    ),
    "ratio": re.compile(r"\b\d+:\d+\b"),
}
SCALES = {
    **dict.fromkeys(("hundred", "hundert"), 2),
    **dict.fromkeys(("thousand", "tausend", "bin", "mil", "mille", "हज़ार", "ألف", "هزار"), 3),
    **dict.fromkeys(("万", "萬"), 4),
    **dict.fromkeys(("lakh", "lakhs", "लाख"), 5),
    **dict.fromkeys(("million", "millions", "millionen", "mio", "milyon", "millón", "millones"), 6),
    **dict.fromkeys(("مليون", "ملايين", "میلیون"), 6),
    **dict.fromkeys(("crore", "crores", "करोड़"), 7),
    **dict.fromkeys(("億", "亿"), 8),
    **dict.fromkeys(("billion", "billions", "milliarde", "milliarden", "milliard", "milliards"), 9),
    **dict.fromkeys(("mrd", "milyar"), 9),
    **dict.fromkeys(("trillion", "trillions", "billionen"), 12),
}
SHORT_SCALES = {"k": 3, "m": 6, "b": 9}  # behind an amount of money: $1.2M
# Letters with the vowel signs of Devanagari, which are no letters; of Chinese and Japanese one.
SCALE = re.compile(r"\s*([万萬億亿]|(?:[^\W\d_]|[\u0900-\u0963])+)")


# Other ways to write the same, in order.
REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[,!;]|(?<=\d)\{,\}(?=\d)", ""),
        (r"\\(?:times|cdot)\b", "×"),
        (r"(\d?)\s*\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1 \2/\3"),
        (r"(\d?)\s*\\[dtc]?frac\s*(\d)\s*(\d)", r"\1 \2/\3"),
        (r"(?<!\d)\*\*|\*\*(?!\d)", " "),  # bold, and no power
        (r"(?<![^\W_])_(?=\d)|(?<=\d)_(?![^\W_])", " "),  # italics
        (r"(?<=\d)\uff0c(?=\d)", ","),
        (r"(?<=\d)\uff0e(?=\d)", "."),
        (r"\b(?:USD|EUR|GBP|INR|CHF|JPY|CNY|TRY|TL)(?=\d)", "$"),
        (r"\bRs\.?\s?(?=\d)", "₹"),
        (r"(?<=\d)\s*[–—]\s*(?=\d)", "–"),
        (r"(?<![\w)\]%])–(?=\d)", "-"),
    )
]


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
    starts = [start for start, _, _ in placed]
    for pattern in (BOXES, MARKERS):
        for marker in reversed(list(pattern.finditer(text))):
            following = bisect_left(starts, marker.end())
            # What begins a sum is not its result.
            if following < len(placed) and not OPERATOR.match(text, placed[following][1]):
                return placed[following][2]
    readings = {reading for _, _, reading in placed}
    if len(readings) > 1:
        return Reading(None, "several")
    return placed[0][2] if placed else Reading(None, "none")


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
    text = "".join(parts)
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    return text


def _compatible(char: str) -> str:
    return unicodedata.normalize("NFKC", char).replace("\u2044", "/")


def _readings(text: str) -> list[tuple[int, int, Reading]]:
    """Return what each number-like part of a text gives, and where it begins and ends, in order."""
    placed: list[tuple[int, int, Reading]] = []
    for fault, pattern in NO_NUMBERS.items():

        def blank(match: re.Match[str], fault: str = fault) -> str:
            placed.append((*match.span(), Reading(None, fault)))
            return " " * len(match.group())

        text = pattern.sub(blank, text)
    at, last = 0, None
    while number := NUMBER.search(text, at):
        start = number.start()
        before, before_at, at = text[max(0, start - CONTEXT_CHARS) : start], at, number.end()
        if NAME.search(before) or ROOT.search(before) or SYMBOL.match(text, at):
            is_unit = last is not None and UNIT_BETWEEN.fullmatch(text, before_at, start)
            if not is_unit:
                placed.append((start, at, Reading(None, "formula")))
                last = None
            rest = WORD_REST.match(text, at)
            at = rest.end() if rest else at
            continue
        value = _scaled(_value(number), before, text, at)
        if RANGE.search(before) and last is not None:
            placed.pop()
        if value is not None and NEGATIVE.search(before):
            value = -value
        reading = Reading(value, "" if value is not None else "notation")
        placed.append((start, at, reading))
        last = value
    return sorted(placed, key=lambda part: part[0])


def _scaled(value: Fraction | None, before: str, text: str, at: int) -> Fraction | None:
    """Return a value with the scale that follows it in words, or as a letter behind an amount of money."""
    scale = SCALE.match(text, at)
    if value is None or scale is None:
        return value
    word = scale.group(1)
    if word.casefold() in SCALES:
        return value * Fraction(10 ** SCALES[word.casefold()])
    if before[-1:] in (*CURRENCIES,) and word.casefold() in SHORT_SCALES:
        return value * Fraction(10 ** SHORT_SCALES[word.casefold()])
    return value


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of ``NUMBER``; None if no notation is like it, or it is too large."""
    if max(len(group or "") for group in match.groups()) > MAX_DIGITS:
        return None
    groups = {name: group for name, group in match.groupdict().items() if group is not None}
    try:
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
