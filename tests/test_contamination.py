"""Hints of contamination: scores without rows like training ones, and what the base knows already."""

from __future__ import annotations

import pytest

from halfbyte.config import model_run
from halfbyte.data.conversation import Message, Row
from halfbyte.data.ledger import Ledger, NearDuplicate
from halfbyte.eval.contamination import (
    duplicate_note,
    memory_note,
    repeated_note,
    scores_without_duplicates,
)
from halfbyte.eval.measure import Variant

RUN = model_run("org/tiny", [])
ROWS = [
    Row(place, (Message("user", place), Message("assistant", "x")))
    for place in ("test:1", "test:2, turn 4", "test:3", "test:4")
]


def ledger(*places: str) -> Ledger:
    pairs = [NearDuplicate(train="train:9", held_out=place, jaccard=0.95) for place in places]
    return Ledger(
        rows_in={}, trained=0, held_out={}, dropped={}, fingerprints={}, near_duplicates=pairs
    )


def variant(name: str, scores: list[float]) -> Variant:
    return Variant(name, "", scores={"exact_match": scores})


def test_scores_without_the_rows_that_training_nearly_has() -> None:
    variants = [variant("adapter", [1, 1, 0, 1]), variant("nearest", [1, 1, 0, 0])]
    found = ledger("test:1", "test:2")
    clean = scores_without_duplicates(found, ROWS, variants, RUN)
    assert clean["adapter"]["exact_match"]["value"] == 0.5
    assert clean["nearest"]["exact_match"]["value"] == 0.0
    assert clean["adapter"]["exact_match"]["n"] == 2
    note = duplicate_note(found, clean, "exact_match")
    assert note.endswith("exact_match on the 2 rows without one: adapter 0.500, nearest 0.000.")


@pytest.mark.parametrize("places", [(), ("test:1", "test:2", "test:3", "test:4"), ("test:77",)])
def test_all_rows_or_none_leave_nothing_to_compare(places: tuple[str, ...]) -> None:
    variants = [variant("adapter", [1, 1, 0, 1])]
    found = ledger(*places)
    assert scores_without_duplicates(found, ROWS, variants, model_run("org/tiny", [])) == {}
    note = duplicate_note(found, {}, "exact_match")
    assert note.startswith("No training prompt") is (places == ())


def test_answers_that_the_base_knows_are_counted() -> None:
    base = variant("base-full", [0, 0, 0, 0])
    base.losses = [(0.1, 5), (20.0, 5), (0.0, 2), (0.3, 4)]
    assert memory_note([variant("adapter", [])]) == []
    (note,) = memory_note([base])
    assert "certain of 2 of 3 wanted answers" in note
    base.losses = [(20.0, 5)]
    assert memory_note([base]) == []


def test_scores_are_not_given_where_the_ledger_names_only_some_pairs() -> None:
    found = ledger("test:1")
    found.totals["near_duplicates"] = 2
    clean = scores_without_duplicates(found, ROWS, [variant("adapter", [1, 1, 0, 1])], RUN)
    assert clean == {}
    assert duplicate_note(found, clean, "exact_match").startswith("2 pairs")


def test_rows_with_the_prompt_of_another_are_counted() -> None:
    assert repeated_note(ROWS) == []
    (note,) = repeated_note([*ROWS, ROWS[0], ROWS[1]])
    assert note.startswith("2 of the 6 rows have the prompt of another one.")
