"""The medical-coding dataset: the same bytes each time, the known counts, no test prompt in training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from toys import read_table

from halfbyte.data.icd10 import build_icd10
from halfbyte.data.normal import normalised
from halfbyte.errors import DataError

# simple-icd-10-cm 1.5.0 reads its tables with functions that Python 3.11 and 3.12 call deprecated
# (3.13 took that back); can go with Python 3.12.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:(read_text|open_text) is deprecated\. Use files\(\):DeprecationWarning"
)

FILES = ("train.jsonl", "test.jsonl", "card.json")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("icd10")
    build_icd10(folder)
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_table(str(path)).rows]


def test_build_icd10_writes_the_same_bytes_each_time(built: Path, tmp_path: Path) -> None:
    build_icd10(tmp_path / "new" / "folder")
    for name in FILES:
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (built / name).read_bytes()
    assert sorted(path.name for path in built.iterdir()) == sorted(FILES)


def test_build_icd10_counts_what_it_wrote(built: Path, tmp_path: Path) -> None:
    counts = build_icd10(tmp_path)
    assert counts == {
        "descriptions": 1798,
        "categories": 80,
        "inclusion_terms": 597,
        "test": 596,
        "left_out_repeated_or_in_training_or_ambiguous": 1,
    }
    train, test = rows_of(built / "train.jsonl"), rows_of(built / "test.jsonl")
    assert (len(train), len(test)) == (1798, 596)
    assert len({row["completion"] for row in train}) == 80
    card = json.loads((built / "card.json").read_text(encoding="utf-8"))
    assert (card["counts"], card["chapter"]) == (counts, "9")


def test_build_icd10_puts_no_test_prompt_into_training(built: Path) -> None:
    train = {normalised(row["prompt"]) for row in rows_of(built / "train.jsonl")}
    test = [normalised(row["prompt"]) for row in rows_of(built / "test.jsonl")]
    assert len(test) > 500
    assert train.isdisjoint(test)
    assert len(set(test)) == len(test)


@pytest.mark.parametrize(
    ("chapter", "term"),
    [
        ("15", None),  # one term is a description too
        ("17", "46, XX with streak gonads"),  # of Q50 and of Q99
        ("21", "Medical surveillance following completed treatment"),  # of Z08 and of Z09
    ],
)
def test_build_icd10_leaves_out_terms_in_training_or_of_several_categories(
    tmp_path: Path, chapter: str, term: str | None
) -> None:
    counts = build_icd10(tmp_path, chapter)
    train = {normalised(row["prompt"]) for row in rows_of(tmp_path / "train.jsonl")}
    test = [normalised(row["prompt"]) for row in rows_of(tmp_path / "test.jsonl")]
    assert train.isdisjoint(test)
    assert len(set(test)) == len(test) == counts["test"] < counts["inclusion_terms"]
    assert term is None or normalised(term) not in test


def test_build_icd10_answers_with_title_and_code_of_the_category(built: Path) -> None:
    rows = [*rows_of(built / "train.jsonl"), *rows_of(built / "test.jsonl")]
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert all(re.fullmatch(r".+ \(I\d[0-9A]\)", row["completion"]) for row in rows)
    assert all(row["prompt"].strip() for row in rows)
    assert {
        "prompt": "ST elevation (STEMI) myocardial infarction of anterior wall",
        "completion": "Acute myocardial infarction (I21)",
    } in rows


def test_build_icd10_asks_training_and_test_for_the_same_categories(built: Path) -> None:
    train = {row["completion"] for row in rows_of(built / "train.jsonl")}
    assert {row["completion"] for row in rows_of(built / "test.jsonl")} <= train


@pytest.mark.parametrize("chapter", ["0", "23", "I21", "I20-I25", "IX", ""])
def test_build_icd10_names_a_chapter_that_does_not_exist(tmp_path: Path, chapter: str) -> None:
    with pytest.raises(DataError) as caught:
        build_icd10(tmp_path, chapter)
    assert str(caught.value) == f"chapter {chapter!r}: ICD-10-CM has the chapters 1 to 22"
    assert list(tmp_path.iterdir()) == []


def test_build_icd10_builds_another_chapter(tmp_path: Path) -> None:
    build_icd10(tmp_path, "10")
    assert {row["completion"][-4] for row in rows_of(tmp_path / "train.jsonl")} == {"J"}


def test_build_icd10_names_the_version_it_needs_when_another_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version's metadata, first on the path as an old installation would be."""
    info = tmp_path / "site" / "simple_icd_10_cm-1.4.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: simple-icd-10-cm\nVersion: 1.4.0\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(DataError) as caught:
        build_icd10(tmp_path / "out")
    assert str(caught.value) == (
        "simple-icd-10-cm 1.5.0 is needed, found 1.4.0: pip install simple-icd-10-cm==1.5.0"
    )
    assert not (tmp_path / "out").exists()
