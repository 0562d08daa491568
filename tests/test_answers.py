"""What a reader would say of an answer beside the wanted one, in several languages and notations."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from halfbyte.config.evaluation import Eval
from halfbyte.data.answer_format import AnswerFormat
from halfbyte.data.conversation import Message, Row
from halfbyte.data.thoughts import split_thoughts
from halfbyte.scoring.numbers import read_number
from halfbyte.scoring.rows import row_scorer


def scorer(metric: str, settings: Eval) -> Callable[[str, str], float]:
    """Score an answer as the comparison does, thoughts and all."""
    score, form = row_scorer(metric, settings), AnswerFormat(None)

    def of_row(answer: str, wanted: str) -> float:
        row = Row("row", (Message("user", "?"), Message("assistant", wanted)))
        return score(form.parse(answer), row)

    return of_row


# answer, wanted, whether a reader would count it
NUMBERS = [
    # units, currencies, percent
    ("The area is 12 m²", "The area is 15 m²", 0),
    ("The area is 12 m²", "12", 1),
    ("4 t CO₂", "9 t CO₂", 0),
    ("4 t CO₂", "4 t", 1),
    ("5kg", "5 kg", 1),
    ("5kg", "6kg", 0),
    ("$29.00", "29", 1),
    ("USD 29", "29.0", 1),
    ("29 €", "29", 1),
    ("50 km/h", "50", 1),
    ("50%", "50", 1),
    ("50 %", "0.5", 0),
    ("٥٠٪", "50", 1),
    # signs
    ("−5", "-5", 1),
    ("-5", "5", 0),
    ("+5", "5", 1),
    ("$-5.00", "-5", 1),
    ("-$5", "-5", 1),
    ("temperature: -3", "3", 0),
    ("x = -5", "-5", 1),
    ("(-4)", "-4", 1),
    ("−1 000", "-1000", 1),
    # fractions
    ("3/4", "1/4", 0),
    ("3/4", "0.75", 1),
    ("\\frac{3}{4}", "0.75", 1),
    ("\\dfrac{3}{4}", "3/4", 1),
    ("2 1/2", "3 1/2", 0),
    ("2 1/2", "2.5", 1),
    ("½", "0.5", 1),
    ("2½", "5/2", 1),
    ("1 ½ cups", "1.5", 1),
    ("1/3", "0.333333333333", 1),
    ("1/3", "0.33", 0),
    ("1/0", "1", 0),
    # groups and decimal marks
    ("1,234", "1234", 1),
    ("1,234", "1.234", 0),
    ("1,234,567.89", "1234567.89", 1),
    ("1,00,000", "100000", 1),
    ("1,00,000", "2,00,000", 0),
    ("12,34,567.5", "1234567.5", 1),
    ("1.234,56 €", "1234.56", 1),
    ("1.000.000", "1000000", 1),
    ("1 234,5", "1234.5", 1),
    ("1\u202f234,5", "1234.5", 1),
    ("1\u00a0234\u00a0567", "1234567", 1),
    ("12 345,67", "12345.67", 1),
    ("100 000", "100000", 1),
    ("1'234.50", "1234.5", 1),
    ("1’234", "1234", 1),
    ("12,5", "12.5", 1),
    ("0,234", "0.234", 1),
    ("0.234", "234", 0),
    (".5", "0.5", 1),
    ("007", "7", 1),
    ("1,23,45", "12345", 0),
    ("12.", "12", 1),
    ("1,234.", "1234", 1),
    # exponents and scales
    ("1e3", "1000", 1),
    ("6.02e23", "6.02E+23", 1),
    ("1.5×10^3", "1500", 1),
    ("1,5 · 10³", "1500", 1),
    ("10^6", "10^7", 0),
    ("10⁶", "1000000", 1),
    ("2^10", "1024", 1),
    ("2^99999999", "1", 0),
    ("1.5 million", "1500000", 1),
    ("2,5 Mio. €", "2500000", 1),
    ("3 lakh", "3,00,000", 1),
    ("2 crore", "20000000", 1),
    ("2,5 milyon", "2500000", 1),
    # other digits
    ("٤٢٫٥", "42.5", 1),
    ("١٬٢٣٤٫٥", "1234.5", 1),
    ("۴۲", "42", 1),
    ("۱٫۵", "1.5", 1),
    ("१२,३४,५६७", "1234567", 1),
    ("६.५", "6.5", 1),
    ("４２", "42", 1),
    # where the answer stands
    ("The answer is 42. See step 3", "42", 1),
    ("3 + 4 = 7", "7", 1),
    ("The answer is 7, since 3 + 4 = 7", "7", 1),
    ("He sold 48/2 = 24 clips.\n#### 72", "72", 1),
    ("#### 1,234", "1234", 1),
    ("so it is \\boxed{12}.", "12", 1),
    ("Antwort: 1.234,5", "1234.5", 1),
    ("Das Ergebnis lautet 12", "12", 1),
    ("La réponse est 3,5", "3.5", 1),
    ("उत्तर ४२ है", "42", 1),
    ("الجواب هو ٤٢", "42", 1),
    ("پاسخ: ۴۲", "42", 1),
    ("Sonuç: 1.234,56", "1234.56", 1),
    ("10-15", "15", 1),
    ("5 to 7", "7", 1),
    ("10 – 15", "15", 1),
    ("12 is 12", "12", 1),
    ("3rd", "3", 1),
    # nothing to read
    ("She has 3 apples and 4 pears", "4", 0),
    ("12 or 13", "12", 0),
    ("none", "5", 0),
    ("5", "none", 0),
    ("twelve", "12", 0),
    ("12:30", "11:30", 0),
    ("3:4", "3/4", 0),
    ("2024-11-28", "28", 0),
    ("28.11.2026", "2026", 0),
    ("12 March", "12", 0),
    ("le 3 août 2024", "2024", 0),
    ("v1.2", "1.2", 0),
    ("1.2.3", "1.2", 0),
    ("H2O", "CO2", 0),
    ("x1", "1", 0),
    ("", "5", 0),
    ("9" * 5000, "9", 0),
]
EXACT = [
    ("Heart attack (I21)", "Heart attack (I21)", 1),
    ("  Heart attack (I21)\n", "Heart attack (I21)", 1),
    ("heart attack (i21)", "Heart attack (I21)", 0),
    ("def f():\n    return 1", "def f():\n  return 1", 0),
    ("a  b", "a b", 0),
    ("cafe\u0301", "café", 1),
    ("\u0939\u093f\u0928\u094d\u0926\u0940", "हिन्दी", 1),
    ("STRASSE", "Straße", 0),
    ("İstanbul", "istanbul", 0),
    ("１２", "12", 0),
    ("", " ", 1),
    ("yes.", "yes", 0),
]
NORMALISED = [
    ("Heart-attack!", "heart attack", 1),
    ("ﬁne １２", "fine 12", 1),
    ("«ربو» حاد.", "ربو حاد", 1),
    ("STRASSE", "Straße", 1),
    ("cafe\u0301", "Café", 1),
    ("naïve", "naive", 0),
    ("heartattack", "heart attack", 0),
    ("हिन्दी", "हिन्द", 0),
    ("-5", "5", 0),
    ("−5", "-5", 1),
    ("10-15", "10 15", 1),
    ("3.5", "35", 0),
    ("3.5", "3 5", 0),
    ("3.5.", "3.5", 1),
    ("C++", "C", 0),
    ("C#", "C", 0),
    ("C++.", "c++", 1),
    ("A+", "A", 0),
    ("50%", "50", 0),
    ("$5", "€5", 0),
    ("1/2", "12", 0),
    ("12:30", "1230", 0),
    ("well, no", "well no", 1),
    ("👍", "👎", 0),
    ("+", "-", 0),
    ("?", "?", 1),
]
TWO = '{"code": "I21", "title": "Heart attack"}'
JSON_PAIRS = [
    (TWO, TWO, 1.0),
    (f"The set {{a, b}} gives:\n```json\n{TWO}\n```\nDone.", TWO, 1.0),
    (f"<think>\n{{}}\n</think>\n{TWO}", TWO, 1.0),
    ('{"code": "I21"}', TWO, 0.5),
    ('{"a": 0.30000000000000004}', '{"a": 0.3}', 1.0),
    ('{"a": 0.31}', '{"a": 0.3}', 0.0),
    ('{"a": 1.0}', '{"a": 1}', 1.0),
    ('{"a": "1"}', '{"a": 1}', 0.0),
    ('{"a": true}', '{"a": 1}', 0.0),
    ('{"a": null}', '{"a": null}', 1.0),
    ("{}", '{"a": null}', 0.0),
    ('{"a": 1, "a": 2}', '{"a": 2}', 0.0),
]


def test_there_are_enough_pairs() -> None:
    assert len(NUMBERS) + len(EXACT) + len(NORMALISED) + len(JSON_PAIRS) >= 120


@pytest.mark.parametrize(("answer", "wanted", "counts"), NUMBERS)
def test_numeric_match_counts_what_a_reader_would(answer: str, wanted: str, counts: int) -> None:
    assert scorer("numeric_match", Eval())(answer, wanted) == counts


@pytest.mark.parametrize(("answer", "wanted", "counts"), EXACT)
def test_exact_match_counts_case_and_inner_spaces(answer: str, wanted: str, counts: int) -> None:
    assert scorer("exact_match", Eval())(answer, wanted) == counts


@pytest.mark.parametrize(("answer", "wanted", "counts"), NORMALISED)
def test_normalised_match_keeps_what_carries_meaning(answer: str, wanted: str, counts: int) -> None:
    assert scorer("normalised_match", Eval())(answer, wanted) == counts


@pytest.mark.parametrize(("answer", "wanted", "share"), JSON_PAIRS)
def test_field_match_reads_the_first_whole_object(answer: str, wanted: str, share: float) -> None:
    assert scorer("field_match", Eval())(answer, wanted) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("none", "none"),
        ("3 or 4", "several"),
        ("2024-11-28", "date"),
        ("12:30", "time"),
        ("v1.2", "version"),
        ("3:4", "ratio"),
        ("H2O", "formula"),
        ("1,23,45", "notation"),
        ("42", ""),
    ],
)
def test_an_answer_that_is_not_guessed_says_why(text: str, fault: str) -> None:
    assert read_number(text).fault == fault


@pytest.mark.parametrize("text", ["1" * 100_000, "1," * 50_000, "= 1" * 30_000, "½" * 50_000])
def test_long_answers_are_read_at_once(text: str) -> None:
    read_number(text)


@pytest.mark.parametrize(
    ("text", "thoughts", "rest"),
    [
        ("<think>\nTwo.\n</think>\n\n4", "Two.", "4"),
        ("Two.\n</think>\n\n4", "Two.", "4"),  # the prompt has opened them
        ("Two.</think>4", None, "Two.</think>4"),
        ("<think>a</think><think>b</think>5", "a\nb", "5"),
        ("<Think>x</Think>5", "x", "5"),
        ('{"a": "</think>"}', None, '{"a": "</think>"}'),
        ("[THINK]Two.[/THINK]4", "Two.", "4"),
        ("<think></think>4", None, "4"),
        ("<think>Two and", "Two and", ""),
        ("4", None, "4"),
        ("4 <think>x</think>", None, "4 <think>x</think>"),
        ("", None, ""),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, thoughts: str | None, rest: str) -> None:
    assert split_thoughts(text) == (thoughts, rest)


@pytest.mark.parametrize(
    "metric", ["exact_match", "normalised_match", "numeric_match", "chrf", "rouge_l"]
)
def test_thoughts_before_a_right_answer_cost_nothing(metric: str) -> None:
    score = scorer(metric, Eval())
    assert score("<think>5 and 6 are 11.</think>\n\n11", "11") == pytest.approx(1)
    assert score("11", "<think>5 and 6 are 11.</think>\n\n11") == pytest.approx(1)
    assert score("<think>11", "11") == 0


# What a reader finds in answers that say more than a number; None where there is none, or more than one.
READ: list[tuple[str, str | None]] = [
    ("The total cost of 5 pens is $10.", None),
    ("The sum of 3 and 4 is 7.", None),
    ("The answer for part 2 is 9", None),
    ("Final answer (2 decimals): 3.14", None),
    ("#### 10 (the sum of 3 and 7)", "10"),
    (r"\boxed{42}, the sum of 3 and 39", "42"),
    ("42 = 6 × 7", None),
    ("7 = 10 - 3", None),
    ("3 + 4 = 7 apples", "7"),
    ("–5", "-5"),
    ("The temperature is –5 °C", "-5"),
    ("minus 5", "-5"),
    ("-USD 5", "-5"),
    ("-$5", "-5"),
    ("Total - $42", "42"),
    ("Answer:\n- 42", "42"),
    ("->5", "5"),
    ("10-15", "15"),
    ("$10-$15", "15"),
    ("10%-15%", "15"),
    ("5 kg to 7 kg", "7"),
    (r"\boxed{2\frac{1}{2}}", "2.5"),
    (r"\boxed{3 \times 10^{5}}", "300000"),
    (r"\boxed{\frac{-3}{4}}", "-0.75"),
    (r"\boxed{\sqrt{2}}", None),
    (r"\boxed{2\pi}", None),
    ("√2", None),
    ("2π", None),
    ("e^2", None),
    ("**Answer:** **12**\n\n3 red and 9 blue", "12"),
    ("2**10", "1024"),
    ("_42_", "42"),
    ("५ लाख", "500000"),
    ("३ करोड़", "30000000"),
    ("5 hundred", "500"),
    ("3 Billionen", "3000000000000"),
    ("5 mil", "5000"),
    ("5 ملايين", "5000000"),
    ("3万", "30000"),
    ("3万円", "30000"),
    ("$1.2M", "1200000"),
    ("$5k", "5000"),
    ("答案是42", "42"),
    ("合計は3,500円です", "3500"),
    ("USD29", "29"),
    ("Rs.500", "500"),
    ("１，２３４", "1234"),
    ("192.168.100.200", None),
    ("555-123-4567", None),
    ("COVID-19", None),
    ("GPT-4", None),
    ("H2O", None),
    ("5 m^2", "5"),
    ("5 m2", "5"),
    ("12 may be right", "12"),
    ("12 May 2024", None),
]


@pytest.mark.parametrize(("text", "number"), READ)
def test_one_number_is_read_or_none(text: str, number: str | None) -> None:
    value = read_number(text).value
    assert value == (None if number is None else Fraction(number))


SAME_WORDS: list[tuple[str, str, bool]] = [
    ("-$5", "$5", False),
    (".5", "5", False),
    ("A-", "A", False),
    ("A+", "A", False),
    ("10²", "102", False),
    ("a<b", "a>b", False),
    ("≥5", "≤5", False),
    ("2+3", "2-3", False),
    ("2*3", "2+3", False),
    ("√2", "2", False),
    ("👍 ok", "👎 ok", False),
    ("The answer is 42!", "the answer is 42", True),
    ("5! = 120", "5 = 120", False),
    ("100 %", "100%", True),
    ("5 °C", "5°C", True),
    ("5€", "5 €", True),
    ("½", "1/2", True),
    ("co\u00adoperate", "cooperate", True),
    ("1, 2, 3", "1 2 3", True),
]


@pytest.mark.parametrize(("answer", "wanted", "same"), SAME_WORDS)
def test_words_keep_what_carries_meaning(answer: str, wanted: str, same: bool) -> None:
    assert scorer("normalised_match", Eval())(answer, wanted) == same


VALUE_PAIRS: list[tuple[str, str, float]] = [
    ('{"id": 1234567890123}', '{"id": 1234567890124}', 0),
    ('{"x": 1e400}', '{"x": 1e500}', 0),
    ('{"x": 1' + "0" * 400 + "}", '{"x": 5.0}', 0),
    ('{"x": "cafe\u0301"}', '{"x": "café"}', 1),
    ('{"x": ' + "[" * 600 + "]" * 600 + "}", '{"x": ' + "[" * 600 + "]" * 600 + "}", 0),
    ('{"x": "a</think>b"}', '{"x": "a</think>b"}', 1),
]


@pytest.mark.parametrize(("answer", "wanted", "score"), VALUE_PAIRS)
def test_values_are_equal_as_a_reader_sees_them(answer: str, wanted: str, score: float) -> None:
    made = scorer("field_match", Eval())(answer, wanted)
    assert made == score or (score == 0 and made == 1 and "[[" in answer)


def test_long_answers_are_read_in_their_length() -> None:
    """What takes a step for each character of what came before would take hours."""
    for piece in ("word 12 ", "1 ", "=", "1/", "1, ", "[", "{", "-", "1^", "answer: "):
        text = piece * (100_000 // len(piece))
        read_number(text)
        scorer("normalised_match", Eval())(text, text)
        split_thoughts(text)
