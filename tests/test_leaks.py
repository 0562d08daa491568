"""Near duplicates: buckets are crc32 of shingles, and nothing that is similar is passed over."""

from __future__ import annotations

import random
import zlib

import pytest
from toys import near_pairs

from halfbyte.data import leaks
from halfbyte.data.leaks import COMMON_FRAC, NUM_BUCKETS, SHINGLE

WORDS = ["chest", "pain", "exertion", "fever", "night", "left", "right", "since", "no", "arm", "of"]
CHARS = ["a", "b", "c", "x", "é", "東", "😀", "\ud800", " ", "I", "ß", "İ"]


def buckets(text: str) -> set[int]:
    padded = f" {' '.join(text.casefold().split())} "
    shingles = {padded[k : k + SHINGLE] for k in range(max(1, len(padded) - SHINGLE + 1))}
    return {zlib.crc32(s.encode("utf-8", "replace")) % NUM_BUCKETS for s in shingles}


def every_pair(
    train: list[str], held_out: list[str], threshold: float
) -> list[tuple[int, int, float]]:
    """The definition: each pair by itself, the most similar first."""
    sets = [buckets(text) for text in (*train, *held_out)]
    if len(sets) >= 20:
        rare = {b for b in set.union(*sets) if sum(b in s for s in sets) / len(sets) <= COMMON_FRAC}
        sets = [one & rare for one in sets]
    pairs = []
    for i, one in enumerate(sets[: len(train)]):
        for j, other in enumerate(sets[len(train) :]):
            if one & other:
                pairs.append((i, j, len(one & other) / len(one | other)))
    return sorted((p for p in pairs if p[2] >= threshold), key=lambda pair: -pair[2])


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_near_duplicates_are_the_pairs_of_the_definition_in_its_order(
    seed: int, threshold: float
) -> None:
    source = random.Random(seed)
    letters = CHARS[: source.randint(2, len(CHARS))]
    texts = ["".join(source.choices(letters, k=source.randint(0, 40))) for _ in range(40)]
    texts += [text + source.choice(letters) for text in texts]
    texts += [text.upper() for text in texts[:5]]
    source.shuffle(texts)
    train, held_out = texts[:60], [*texts[60:], *texts[:3]]
    wanted = every_pair(train, held_out, threshold)
    assert wanted
    assert near_pairs(train, held_out, threshold) == wanted


@pytest.mark.parametrize("limit", [1, 200, 3000])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_that_do_not_fit_in_memory_give_the_same_pairs(
    monkeypatch: pytest.MonkeyPatch, limit: int, block: int
) -> None:
    source = random.Random(block)
    texts = ["".join(source.choices(CHARS, k=source.randint(0, 30))) for _ in range(50)]
    texts += [text + source.choice(CHARS) for text in texts]
    source.shuffle(texts)
    wanted = near_pairs(texts[:70], texts[70:], 0.7)
    assert wanted
    monkeypatch.setattr(leaks, "MAX_SHINGLES", limit)
    monkeypatch.setattr(leaks, "BLOCK_ROWS", block)
    assert near_pairs(texts[:70], texts[70:], 0.7) == wanted


def test_few_prompts_are_counted_of_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shingles are boilerplate is estimated then; pairs that are alike are still found."""
    source = random.Random(1)
    texts = ["Please code: " + " ".join(source.choices(WORDS, k=12)) for _ in range(300)]
    monkeypatch.setattr(leaks, "SAMPLE", 40)
    found = near_pairs([*texts, "Please code: fox"], [texts[17].upper(), texts[299]], 0.9)
    assert {(i, j) for i, j, similarity in found if similarity == 1} == {(17, 0), (299, 1)}


def test_near_duplicates_are_found_among_many_that_share_most_of_their_text() -> None:
    """Rare shingles alone must not decide: these differ in a number."""
    source = random.Random(0)
    notes = [" ".join(source.choices(WORDS, k=25)) for _ in range(30)]
    texts = [f"{notes[n % 30]}, week {n // 30}" for n in range(300)]
    wanted = every_pair(texts[:250], texts[250:], 0.9)
    assert len(wanted) > 100
    assert near_pairs(texts[:250], texts[250:], 0.9) == wanted
