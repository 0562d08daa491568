"""Preparation: every row is trained on, held out or dropped for a reason; leaks and long rows are named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import chatml_tokenizer, near_pairs, write_rows

from halfbyte.config.dataset import Data
from halfbyte.data.conversation import Message, Row
from halfbyte.data.encoded import IGNORED
from halfbyte.data.ledger import Ledger, PartTokens
from halfbyte.data.normal import digest_of, fraction_of, normalised
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError

WORDS = ("heart", "attack", "acute", "chronic", "wall", "fox", "lazy", "dog", "brown", "quick")

POLICY = "Mend the data, or leave such rows out and count them with data.on_malformed=drop"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(chatml_tokenizer())


def hash_fraction(prompt: str) -> float:
    return float(fraction_of(digest_of(prompt)))


def pair(prompt: str, completion: str = "yes") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def data_of(train: Path, **values: Any) -> Data:
    return Data.model_validate({"train": str(train), **values})


def length_of(row: dict[str, Any], renderer: Renderer) -> int:
    messages = (Message("user", row["prompt"]), Message("assistant", row["completion"]))
    return len(renderer.encode_row(Row("row", messages)).ids)


def check_ledger(prepared: Prepared, num_rows: int) -> None:
    """Counts against the rows that were written and the rows that are there."""
    ledger = prepared.ledger
    assert sum(ledger.rows_in.values()) == num_rows
    assert ledger.trained == len(prepared.train)
    assert ledger.held_out == {
        "validation": len(prepared.validation),
        "test": len(prepared.test),
    }
    assert num_rows == (
        ledger.trained + sum(ledger.held_out.values()) + sum(ledger.dropped.values())
    )


# --- lengths ---

SHORT, LONG = pair("heart attack"), pair("acute heart attack", "chronic " * 40)
ENDLESS = pair("heart " * 40)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", [SHORT, LONG, ENDLESS, {**SHORT, "prompt": "fox"}])


def test_prepare_names_overlong_rows_with_lengths(mixed: Path, renderer: Renderer) -> None:
    long, endless = length_of(LONG, renderer), length_of(ENDLESS, renderer)
    assert min(long, endless) > 40
    with pytest.raises(DataError) as caught:
        prepare(data_of(mixed, max_length=40), renderer)
    assert str(caught.value) == (
        f"2 rows are longer than data.max_length 40: {mixed}:2 ({long}), {mixed}:3 ({endless}). Set"
        f" data.max_length={max(long, endless)}, or data.on_overlength to drop or truncate"
    )
    prepared = prepare(data_of(mixed, max_length=max(long, endless)), renderer)
    check_ledger(prepared, 4)
    assert len(prepared.train) == 4


def test_prepare_names_at_most_ten_overlong_rows_and_the_count_of_all(
    tmp_path: Path, renderer: Renderer
) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{**LONG, "prompt": f"fox {n}"} for n in range(13)])
    with pytest.raises(DataError) as caught:
        prepare(data_of(path, max_length=20), renderer)
    text = str(caught.value)
    assert text.startswith("13 rows are longer than data.max_length 20: ")
    assert text.count(str(path)) == 10


def test_prepare_drops_and_counts_overlong_rows(mixed: Path, renderer: Renderer) -> None:
    prepared = prepare(data_of(mixed, max_length=40, on_overlength="drop"), renderer)
    assert [example.row.place for example in prepared.train] == [f"{mixed}:1", f"{mixed}:4"]
    assert prepared.ledger.dropped == {"longer than max_length": 2}
    assert prepared.ledger.truncated == []
    check_ledger(prepared, 4)


def test_prepare_keeps_rows_of_exactly_max_length(mixed: Path, renderer: Renderer) -> None:
    size = length_of(SHORT, renderer)
    prepared = prepare(data_of(mixed, max_length=size, on_overlength="drop"), renderer)
    assert len(prepared.train[0].encoded.ids) == size
    assert prepared.train[0].row.place == f"{mixed}:1"


def test_prepare_truncates_and_lists_rows_and_drops_those_without_a_label_left(
    mixed: Path, renderer: Renderer
) -> None:
    whole = prepare(data_of(mixed), renderer)
    prepared = prepare(data_of(mixed, max_length=40, on_overlength="truncate"), renderer)
    assert [example.row.place for example in prepared.train] == [f"{mixed}:{n}" for n in (1, 2, 4)]
    assert prepared.ledger.truncated == [f"{mixed}:2"]
    assert prepared.ledger.dropped == {"no labelled token within max_length": 1}
    check_ledger(prepared, 4)
    cut, full = prepared.train[1].encoded, whole.train[1].encoded
    assert (cut.ids, cut.labels) == (full.ids[:40], full.labels[:40])
    assert cut.num_supervised > 0


def test_prepare_applies_the_length_policy_to_held_out_rows(
    tmp_path: Path, renderer: Renderer
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [SHORT])
    test = write_rows(tmp_path / "test.jsonl", [pair("fox"), LONG, ENDLESS])
    values = {"test": str(test), "max_length": 40}
    dropped = prepare(data_of(train, **values, on_overlength="drop"), renderer)
    assert dropped.ledger.held_out == {"validation": 0, "test": 1}
    assert dropped.ledger.dropped == {"longer than max_length": 2}
    check_ledger(dropped, 4)
    cut = prepare(data_of(train, **values, on_overlength="truncate"), renderer)
    assert [len(example.encoded.ids) for example in cut.test][1:] == [40]
    check_ledger(cut, 4)
    with pytest.raises(DataError, match=rf"2 rows are longer .*{test}:2 "):
        prepare(data_of(train, **values), renderer)


def test_prepare_refuses_when_no_row_is_left_to_train_on(mixed: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError) as caught:
        prepare(data_of(mixed, max_length=8, on_overlength="drop"), renderer)
    assert str(caught.value) == (
        f"{mixed}: no row is left to train on; dropped: {{'longer than max_length': 4}}"
    )


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25)), min_size=1, max_size=12),
    num_test=st.integers(0, 6),
    policy=st.sampled_from(["error", "drop", "truncate"]),
    max_length=st.integers(8, 70),
    validation_frac=st.sampled_from([0.0, 0.3]),
    test_frac=st.sampled_from([0.0, 0.3]),
)
def test_rows_in_are_trained_held_out_or_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    renderer: Renderer,
    lengths: list[tuple[int, int]],
    num_test: int,
    policy: str,
    max_length: int,
    validation_frac: float,
    test_frac: float,
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    source = random.Random(str(lengths))
    rows = [
        pair(" ".join(source.choices(WORDS, k=prompt)), " ".join(source.choices(WORDS, k=answer)))
        for prompt, answer in lengths
    ]
    values: dict[str, Any] = {
        "max_length": max_length,
        "on_overlength": policy,
        "on_leak": "drop",
        "validation_frac": validation_frac,
    }
    num_test = min(num_test, len(rows))
    if num_test:  # test rows repeat training prompts, so that some leak
        values["test"] = str(write_rows(folder / "test.jsonl", rows[:num_test]))
    else:
        values["test_frac"] = test_frac
    path = write_rows(folder / "train.jsonl", rows)
    num_long = sum(length_of(row, renderer) > max_length for row in rows)
    try:
        prepared = prepare(data_of(path, **values), renderer)
    except DataError as error:
        text = str(error)
        if "rows are longer than data.max_length" in text:
            assert policy == "error"
            assert num_long > 0
        else:
            assert text.startswith(f"{path}: no row is left to train on; dropped: ")
        return
    check_ledger(prepared, len(rows) + num_test)
    kept = [*prepared.train, *prepared.validation, *prepared.test]
    places = [example.row.place for example in kept]
    assert len(set(places)) == len(places)
    assert len(places) == len(rows) + num_test - sum(prepared.ledger.dropped.values())
    assert all(len(example.encoded.ids) <= max_length for example in kept)
    assert all(example.encoded.num_supervised for example in kept)
    assert set(prepared.ledger.truncated) <= set(places)
    if num_long and not num_test:
        truncated = len(prepared.ledger.truncated)
        assert truncated + sum(prepared.ledger.dropped.values()) == num_long


# --- the split ---


def sides(prepared: Prepared) -> dict[str, set[str]]:
    return {
        "train": {example.row.prompt for example in prepared.train},
        "validation": {example.row.prompt for example in prepared.validation},
        "test": {example.row.prompt for example in prepared.test},
    }


def test_split_does_not_depend_on_the_order_or_number_of_rows(
    tmp_path: Path, renderer: Renderer
) -> None:
    rows = [pair(f"diagnosis {n} of the heart") for n in range(60)]
    fractions = {"validation_frac": 0.2, "test_frac": 0.2}
    first = prepare(data_of(write_rows(tmp_path / "a.jsonl", rows), **fractions), renderer)
    shuffled = random.Random(1).sample(rows, len(rows))
    again = prepare(data_of(write_rows(tmp_path / "b.jsonl", shuffled), **fractions), renderer)
    assert sides(again) == sides(first)
    assert all(len(side) > 3 for side in sides(first).values())
    fewer = prepare(data_of(write_rows(tmp_path / "c.jsonl", rows[:40]), **fractions), renderer)
    assert all(sides(fewer)[name] <= side for name, side in sides(first).items())


@pytest.mark.parametrize("num_rows", [8, 16, 17, 40])
@pytest.mark.parametrize(
    ("validation", "test"), [(0.25, 0.0), (0.0, 0.25), (0.13, 0.25), (0.5, 0.4)]
)
def test_few_rows_are_held_out_as_the_shares_say(
    tmp_path: Path, renderer: Renderer, num_rows: int, validation: float, test: float
) -> None:
    """By hash alone a quarter of 16 rows is anything from none to eight."""
    for attempt in range(8):
        rows = [pair(f"{attempt} case {n} of the heart") for n in range(num_rows)]
        path = write_rows(tmp_path / "a.jsonl", rows)
        prepared = prepare(data_of(path, validation_frac=validation, test_frac=test), renderer)
        for part, share in ((prepared.validation, validation), (prepared.test, test)):
            assert abs(len(part) - share * num_rows) <= max(1, 0.5 * share * num_rows)
        check_ledger(prepared, num_rows)


def test_split_puts_equal_prompts_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    rows = [
        pair(text, f"answer {k}")
        for n in range(40)
        for k, text in enumerate((f"Is it case {n}?", f"is it  CASE {n}", f"Is it case {n}!?"))
    ]
    path = write_rows(tmp_path / "train.jsonl", rows)
    prepared = prepare(data_of(path, validation_frac=0.25, test_frac=0.25), renderer)
    parts = [{normalised(text) for text in side} for side in sides(prepared).values()]
    assert [len(part) for part in parts if not part] == []
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 40
    check_ledger(prepared, 120)


def test_split_holds_out_about_the_configured_fractions() -> None:
    points = [hash_fraction(f"row {n}") for n in range(4000)]
    assert all(0 <= point < 1 for point in points)
    assert sum(point < 0.1 for point in points) == pytest.approx(400, abs=60)
    assert sum(point < 0.5 for point in points) == pytest.approx(2000, abs=100)


def test_split_keeps_its_sides_between_versions() -> None:
    """A new hash would move rows of old runs from one side to the other."""
    assert hash_fraction("Acute heart attack?") == pytest.approx(0.6016124843911395, abs=1e-12)


def test_split_without_fractions_holds_nothing_out(mixed: Path, renderer: Renderer) -> None:
    prepared = prepare(data_of(mixed), renderer)
    assert prepared.ledger.held_out == {"validation": 0, "test": 0}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  Acute\n\tHeart  attack?! ", "acute heart attack"),
        ("STRASSE, straße.", "strasse, strasse"),
        ("I21.0", "i21.0"),
        ("What is 2+2 ?", "what is 2+2"),
        ("東京。", "東京"),
        ("東京？", "東京"),
        ("كيف؟", "كيف"),
        ("?!", "?!"),
        ("😀", "😀"),
        ("\ud83d", "\ud83d"),
    ],
)
def test_normalised_leaves_case_spaces_and_closing_punctuation_aside(
    prompt: str, expected: str
) -> None:
    assert normalised(prompt) == expected
    assert 0 <= hash_fraction(prompt) < 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("2+2", "2-2"), ("C++", "C#"), ("दाल", "दिल"), ("กิน", "กัน"), ("?", "!"), ("a b", "ab")],
)
def test_normalised_tells_different_prompts_apart(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


# --- leaks ---


@pytest.fixture
def leaking(tmp_path: Path) -> dict[str, Path]:
    train = [pair("Acute heart attack?"), pair("lazy dog"), pair("the FOX  jumps;")]
    test = [pair("Brown dog"), pair("acute Heart attack"), pair("The fox jumps!")]
    return {
        "train": write_rows(tmp_path / "train.jsonl", train),
        "test": write_rows(tmp_path / "test.jsonl", test),
    }


def test_prepare_names_training_rows_whose_prompt_is_held_out(
    leaking: dict[str, Path], renderer: Renderer
) -> None:
    train, test = leaking["train"], leaking["test"]
    with pytest.raises(DataError) as caught:
        prepare(data_of(train, test=str(test)), renderer)
    assert str(caught.value) == (
        f"2 training rows have a prompt that is also held out: {train}:1 = {test}:2;"
        f" {train}:3 = {test}:3. Remove them, or set data.on_leak=drop to leave them out of training"
    )


def test_prepare_drops_and_counts_leaks_from_training_alone(
    leaking: dict[str, Path], renderer: Renderer
) -> None:
    train, test = leaking["train"], leaking["test"]
    prepared = prepare(data_of(train, test=str(test), on_leak="drop"), renderer)
    assert [example.row.place for example in prepared.train] == [f"{train}:2"]
    assert len(prepared.test) == 3
    assert prepared.ledger.dropped == {"prompt is held out": 2}
    check_ledger(prepared, 6)


def test_prepare_finds_leaks_only_by_the_prompt(tmp_path: Path, renderer: Renderer) -> None:
    train = write_rows(tmp_path / "train.jsonl", [pair("heart attack", "same answer")])
    test = write_rows(tmp_path / "test.jsonl", [pair("lazy dog", "same answer")])
    prepared = prepare(data_of(train, test=str(test)), renderer)
    assert prepared.ledger.dropped == {}
    assert prepared.ledger.near_duplicates == []


def test_prepare_lists_near_duplicates_and_keeps_them(tmp_path: Path, renderer: Renderer) -> None:
    long = "acute myocardial infarction of the anterior wall in a patient of seventy years, first visit"
    train = write_rows(tmp_path / "train.jsonl", [pair("the lazy dog"), pair(long)])
    test = write_rows(tmp_path / "test.jsonl", [pair("a quick brown fox"), pair(long + "s")])
    prepared = prepare(data_of(train, test=str(test)), renderer)
    [duplicate] = prepared.ledger.near_duplicates
    assert (duplicate.train, duplicate.held_out) == (f"{train}:2", f"{test}:2")
    assert 0.9 <= duplicate.jaccard < 1
    assert len(prepared.train) == 2
    check_ledger(prepared, 4)


def shingles(text: str) -> set[str]:
    padded = f" {text.lower()} "
    return {padded[k : k + 5] for k in range(len(padded) - 4)}


def test_near_duplicates_are_those_of_a_plain_jaccard_index() -> None:
    source = random.Random(0)
    texts = [" ".join(source.choices(WORDS[:4], k=6)) for _ in range(16)]
    train, held_out = texts[:8], texts[8:]
    expected = {}
    for i, one in enumerate(train):
        for j, other in enumerate(held_out):
            a, b = shingles(one), shingles(other)
            expected[i, j] = len(a & b) / len(a | b)
    threshold = sorted(expected.values())[-12]
    pairs = near_pairs(train, held_out, threshold)
    wanted = {key: pytest.approx(value) for key, value in expected.items() if value >= threshold}
    assert {(i, j): similarity for i, j, similarity in pairs} == wanted
    assert len(pairs) >= 12
    assert [s for *_, s in pairs] == sorted((s for *_, s in pairs), reverse=True)


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [("abc def", "ABC \n def", 1.0), ("a", "A", 1.0), ("", "", 1.0), ("abcdef", "uvwxyz", None)],
)
def test_near_duplicates_handles_short_and_folded_text(
    one: str, other: str, similarity: float | None
) -> None:
    expected = [] if similarity is None else [(0, 0, similarity)]
    assert near_pairs([one], [other], 0.9) == expected


@pytest.mark.parametrize(("train", "held_out"), [([], ["a"]), (["a"], []), ([], [])])
def test_near_duplicates_finds_none_where_a_side_is_empty(
    train: list[str], held_out: list[str]
) -> None:
    assert near_pairs(train, held_out, 0.9) == []


def test_near_duplicates_passes_over_boilerplate_that_most_prompts_share() -> None:
    instruction = "Name the category of this diagnosis as title and code, and give no reasons: " * 3
    tails = [f"{WORDS[n % 10]} {WORDS[n // 10]}" for n in range(30)]
    prompts = [instruction + tail for tail in tails]
    assert near_pairs(prompts[:25], prompts[25:], 0.9) == []
    repeated = [*prompts[:25], instruction + tails[27].upper()]
    assert [(i, j) for i, j, _ in near_pairs(repeated, prompts[25:], 0.9)] == [(25, 2)]


def test_near_duplicates_counts_rows_over_all_blocks() -> None:
    train = [f"{n:05d}" for n in range(2100)]
    assert near_pairs(train, ["none here", "02099"], 0.9) == [(2099, 1, 1.0)]


# --- what else the ledger holds ---


def test_prepare_names_rows_that_cannot_be_rendered_all_at_once(
    tmp_path: Path, renderer: Renderer
) -> None:
    path = write_rows(tmp_path / "train.jsonl", [pair("a \U000f0000"), SHORT, pair("\U000f0001")])
    with pytest.raises(DataError) as caught:
        prepare(data_of(path), renderer)
    assert str(caught.value).splitlines() == [
        f"{path}:{n}: a user message holds a private-use character (U+F0000 to U+FFFFD), which"
        " halfbyte reserves; remove it"
        for n in (1, 3)
    ] + [POLICY]


def test_prepare_counts_the_rows_that_it_does_not_name(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [pair(f"\U000f0000 {n}") for n in range(13)])
    with pytest.raises(DataError, match="3 more rows"):
        prepare(data_of(path), renderer)


def test_prepare_names_malformed_rows_of_the_test_set(tmp_path: Path, renderer: Renderer) -> None:
    train = write_rows(tmp_path / "train.jsonl", [SHORT])
    test = write_rows(tmp_path / "test.jsonl", [pair("fox"), pair("")])
    with pytest.raises(DataError) as caught:
        prepare(data_of(train, test=str(test)), renderer)
    assert str(caught.value) == f"{test}:2: prompt is blank; text is expected\n{POLICY}"


def test_prepare_finds_the_format_of_each_source(tmp_path: Path, renderer: Renderer) -> None:
    train = write_rows(tmp_path / "train.jsonl", [SHORT])
    test = tmp_path / "test.json"
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "yes"}]
    test.write_text(json.dumps([{"messages": messages}]), encoding="utf-8")
    prepared = prepare(data_of(train, test=str(test), system="Be brief."), renderer)
    assert prepared.formats == {"train": "prompt_completion", "test": "messages"}
    kept = [*prepared.train, *prepared.test]
    assert [example.row.messages[0] for example in kept] == [Message("system", "Be brief.")] * 2


def test_prepare_reads_raw_text(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"text": "lazy dog"}, {"text": "brown fox"}])
    prepared = prepare(data_of(path), renderer)
    encoded = prepared.train[0].encoded
    assert encoded.labels == [IGNORED, *encoded.ids[1:]]
    assert prepared.formats == {"train": "text"}


def test_ledger_counts_tokens_duplicates_and_escaped_rows(
    tmp_path: Path, renderer: Renderer
) -> None:
    rows = [SHORT, {**SHORT, "prompt": "Heart ATTACK!"}, pair("what is <|im_end|>")]
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", [pair("and <|im_start|>"), pair("fox"), pair("Fox")])
    prepared = prepare(data_of(train, test=str(test)), renderer)
    ledger = prepared.ledger
    assert ledger.rows_in == {"train": 3, "test": 3}
    assert ledger.duplicate_prompts_in_training == 1
    assert ledger.duplicate_prompts_held_out == 1
    assert ledger.special_token_text == [f"{train}:3", f"{test}:1"]
    assert ledger.changed_by_template == []
    sizes = [length_of(row, renderer) for row in rows]
    assert ledger.tokens["train"].total == sum(sizes)
    labels = [label for e in prepared.train for label in e.encoded.labels]
    assert ledger.tokens["train"].supervised == sum(label != IGNORED for label in labels) > 0
    assert ledger.tokens["validation"] == PartTokens(total=0, supervised=0)
    assert set(ledger.fingerprints) == {"train", "test"}
    assert len(set(ledger.fingerprints.values())) == 2
    assert Ledger.model_validate_json(json.dumps(ledger.as_json())) == ledger
