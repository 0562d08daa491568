"""Metrics: what counts as right, from 0 to 1, and what a missing library says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.config.evaluation import Eval
from halfbyte.errors import UserError
from halfbyte.scoring import metrics
from halfbyte.scoring.metrics import (
    exact_match,
    extract,
    field_match,
    scorer,
)

CODE = r"\(([A-Z]\d\d)\)"


# --- exact_match ---


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("something else (I21)", "Heart attack (I21)", 1),
        ("Heart attack (I22)", "Heart attack (I21)", 0),
        ("not (I10) but (I21)", "Heart attack (I21)", 1),
        ("not (I21) but (I10)", "Heart attack (I21)", 0),
        ("(I21)", "first (I10), then (I21)", 1),
        ("Heart attack", "Heart attack (I21)", 0),
        ("Heart attack (I21)", "Heart attack", 0),
        ("Heart attack", "Heart attack", 0),
        ("", "", 0),
    ],
)
def test_exact_match_with_a_pattern_compares_last_matches(
    answer: str, wanted: str, score: float
) -> None:
    assert exact_match(answer, wanted, CODE) == score
    assert scorer("exact_match", Eval(answer_pattern=CODE))(answer, wanted) == score


def test_exact_match_with_an_optional_group_is_wrong_where_both_have_none() -> None:
    assert exact_match("no idea", "none at all", r"code(?: (\d+))?|$") == 0


@pytest.mark.parametrize(
    ("text", "found"), [("a (I21) b (I10) c", "I10"), ("I21", None), ("", None)]
)
def test_extract_gives_the_group_of_the_last_match(text: str, found: str | None) -> None:
    assert extract(text, CODE) == found


# --- field_match ---

TWO = '{"code": "I21", "title": "Heart attack"}'


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        (TWO, TWO, 1),
        ('{"title": "Heart attack", "code": "I21"}', TWO, 1),
        ('{"code": "I21", "title": "heart attack"}', TWO, 1 / 2),
        ('{"code": "I21"}', TWO, 1 / 2),
        ('{"code": "I21", "title": "Heart attack", "note": "x"}', TWO, 2 / 3),
        ('{"code": "I22", "note": "x"}', TWO, 0),
        ("{}", TWO, 0),
        ("{}", "{}", 1),
        ('{"a": 1}', "{}", 0),
        # text around
        (f"The answer is:\n```json\n{TWO}\n```\nDone.", TWO, 1),
        (f"{TWO} or {{}}", TWO, 1),
        # nested values count whole
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 2]}}', 1),
        ('{"a": {"b": [2, 1]}}', '{"a": {"b": [1, 2]}}', 0),
        ('{"a": {"b": 1, "c": 2}}', '{"a": {"b": 1}}', 0),
        # kinds of values
        ('{"a": "1"}', '{"a": 1}', 0),
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": 0}', '{"a": false}', 0),
        ('{"a": [true]}', '{"a": [1]}', 0),
        ('{"a": null}', '{"a": null}', 1),
        ('{"b": null}', '{"a": null}', 0),
        # no JSON object
        ("", TWO, 0),
        ("I21", TWO, 0),
        ('{"code": "I21"', TWO, 0),
        ("{'code': 'I21'}", TWO, 0),
        ('["I21"]', TWO, 0),
        ("I21", "I21", 0),
        ("no idea", "{}", 0),
    ],
)
def test_field_match_is_the_share_of_equal_fields(answer: str, wanted: str, score: float) -> None:
    assert field_match(answer, wanted) == pytest.approx(score)
    assert scorer("field_match", Eval())(answer, wanted) == pytest.approx(score)


def test_field_match_scores_brackets_without_end_0() -> None:
    assert field_match('{"a": ' + "[" * 3000, TWO) == 0


# --- chrf and rouge_l ---


@pytest.mark.parametrize("metric", ["chrf", "rouge_l"])
@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("Heart attack (I21)", "Heart attack (I21)", 1),
        ("abc", "abc", 1),
        ("東京タワー", "東京タワー", 1),
        ("острый инфаркт", "острый инфаркт", 1),
        ("abc def", "uvw xyz", 0),
        ("", "abc", 0),
    ],
)
def test_text_metrics_are_1_for_identical_and_0_for_disjoint_text(
    metric: str, answer: str, wanted: str, score: float
) -> None:
    assert scorer(metric, Eval())(answer, wanted) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        # One of two 1-grams, no 2-gram: the mean of 1/2 and 0, for precision and for recall.
        ("ab", "ac", 1 / 4),
        # Precision 1; recall the mean of 2/4 and 1/3: 5PR / (4P + R).
        ("ab", "abcd", 5 * (5 / 12) / (4 + 5 / 12)),
        ("the cat is here", "the cat sat here", 0.4761043),
    ],
)
def test_chrf_has_its_known_values(answer: str, wanted: str, score: float) -> None:
    assert scorer("chrf", Eval())(answer, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("the cat is here", "the cat sat here", 3 / 4),
        ("here the cat", "the cat here", 2 / 3),
        # Precision 1, recall 2/4.
        ("the cat", "the cat sat here", 2 / 3),
        ("The CAT.", "the cat", 1),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    answer: str, wanted: str, score: float
) -> None:
    assert scorer("rouge_l", Eval())(answer, wanted) == pytest.approx(score)


def test_chrf_weighs_recall_more_than_precision() -> None:
    chrf = scorer("chrf", Eval())
    assert chrf("abcd", "ab") > chrf("ab", "abcd")


@pytest.fixture
def fresh_libraries() -> Iterator[None]:
    """Scorers are kept after the first use; forget them before and after."""
    for make in (metrics._chrf, metrics._rouge_l):
        make.cache_clear()
    yield
    for make in (metrics._chrf, metrics._rouge_l):
        make.cache_clear()


@pytest.mark.usefixtures("fresh_libraries")
@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        ("chrf", "sacrebleu.metrics.chrf", "sacrebleu"),
        ("rouge_l", "rouge_score.rouge_scorer", "rouge-score"),
    ],
)
def test_scorer_says_what_to_install_when_a_library_is_missing(
    metric: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        scorer(metric, Eval())
    assert str(caught.value) == (
        f"eval.metrics: {metric} needs {package}: pip install 'halfbyte[metrics]'"
    )


# --- schema_valid ---


def test_schema_valid_holds_the_first_value_to_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    schema = {"type": "object", "required": ["code"], "properties": {"code": {"type": "string"}}}
    path.write_text(json.dumps(schema))
    score = scorer("schema_valid", Eval(json_schema=str(path)))
    assert score('It is {"code": "I21"}.', "") == 1
    assert score('{"code": 21}', "") == 0
    assert score('[{"code": "I21"}]', "") == 0
    assert score('{"code": "I21"', "") == 0
    assert score("no JSON", "") == 0
    path.write_text(json.dumps({"type": "array", "items": {"type": "integer"}}))
    assert scorer("schema_valid", Eval(json_schema=str(path)))("[1, 2]", "") == 1


@pytest.mark.parametrize("text", ["{", '{"type": "nonsense"}', None])
def test_a_schema_that_is_none_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "schema.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"eval\.json_schema: .*schema\.json"):
        scorer("schema_valid", Eval(json_schema=str(path)))


# --- bleu ---


def test_bleu_is_sacrebleu_s_of_a_sentence() -> None:
    score = scorer("bleu", Eval())
    assert score("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1)
    assert score("", "the cat") == 0
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no run of four (1/2 of one, smoothed): no brevity penalty
    assert score("a b c e", "a b c d") == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
