"""Rows: five formats give one conversation or text, and every malformed row is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import Read, parse_rows, source_at, store, table_of

from halfbyte.config.dataset import Data
from halfbyte.data.conversation import Message, Row, row_from_json
from halfbyte.data.drops import Drops
from halfbyte.data.rows import FORMATS, ParsedRows
from halfbyte.data.sources import open_table
from halfbyte.data.turns import ROLES
from halfbyte.errors import DataError

S, U, A = "system", "user", "assistant"
ALLOWED_FORMATS = (
    "messages: messages; sharegpt: conversations; prompt_completion: prompt, completion;"
    " alpaca: instruction, output; multiple_choice: question, choices, answer; text: text"
)
POLICY = "Mend the data, or leave such rows out and count them with data.on_malformed=drop"
HALF_PAIR = "is half \ud83d a smile"


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def parsed(values: dict[str, Any], format_name: str = "auto", system: str | None = None) -> Row:
    (row,) = usable(parse_rows(table_of(values), format_name, {}, system))
    return row


def usable(parsed: tuple[Read, ParsedRows]) -> list[Row]:
    """The rows, of which none may be malformed."""
    drops = Drops()
    for error in parsed[0].malformed:
        drops.add_malformed(error, 0)
    drops.check_malformed(Data(train="t.jsonl"))
    return parsed[0].rows


def pairs_of(row: Row) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def error_of(
    *values: dict[str, Any], format_name: str = "auto", columns: dict[str, str] | None = None
) -> str:
    with pytest.raises(DataError) as caught:
        usable(parse_rows(table_of(*values), format_name, columns or {}, None))
    return str(caught.value).removesuffix(f"\n{POLICY}")


# --- the five formats ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": turns((U, "q"), (A, "a"))}, [(U, "q"), (A, "a")]),
        ({"messages": turns((S, "s"), (U, "q"), (A, "a"))}, [(S, "s"), (U, "q"), (A, "a")]),
        (
            {"messages": turns((U, "q"), (A, "a"), (U, "r"), (A, "b"))},
            [(U, "q"), (A, "a"), (U, "r"), (A, "b")],
        ),
        ({"prompt": "q", "completion": "a"}, [(U, "q"), (A, "a")]),
        ({"prompt": " q\n", "completion": "\ta "}, [(U, " q\n"), (A, "\ta ")]),
        ({"prompt": "q", "completion": "a", "system": "s"}, [(S, "s"), (U, "q"), (A, "a")]),
        ({"prompt": "q", "completion": "a", "system": ""}, [(U, "q"), (A, "a")]),
        ({"prompt": "q", "completion": "a", "system": None}, [(U, "q"), (A, "a")]),
        (
            {"prompt": turns((S, "s"), (U, "q")), "completion": turns((A, "a"))},
            [(S, "s"), (U, "q"), (A, "a")],
        ),
        ({"instruction": "q", "output": "a"}, [(U, "q"), (A, "a")]),
        ({"instruction": "q", "input": "i", "output": "a"}, [(U, "q\n\ni"), (A, "a")]),
        ({"instruction": "q", "input": "", "output": "a"}, [(U, "q"), (A, "a")]),
        ({"instruction": "q", "input": None, "output": "a"}, [(U, "q"), (A, "a")]),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            [(S, "s"), (U, "q\n\ni"), (A, "a")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [(U, "q"), (A, "a")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "own"},
                    {"from": "user", "value": "q"},
                    {"from": "assistant", "value": "a"},
                ]
            },
            [(S, "own"), (U, "q"), (A, "a")],
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            [(S, "s"), (U, "q"), (A, "a")],
        ),
    ],
)
def test_parse_rows_gives_the_conversation_of_every_format(
    values: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    row = parsed(values)
    assert pairs_of(row) == expected
    assert row.place == "t.jsonl:1"
    assert row.text is None


def test_parse_rows_gives_raw_text_without_messages() -> None:
    assert parsed({"text": " once\n"}) == Row("t.jsonl:1", (), " once\n")


NESTED: dict[str, dict[str, Any]] = {
    "messages": {"messages": turns((S, "s"), (U, "q"), (A, "a"))},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "system": "s",
    },
    "multiple_choice": {"question": "q", "choices": ["a", "b"], "answer": "B", "system": "s"},
}
FLAT: dict[str, dict[str, Any]] = {
    "prompt_completion": {"prompt": "q", "completion": "a", "system": "s"},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
    "text": {"text": "q"},
}


def test_every_format_is_read_from_files_below() -> None:
    assert set(NESTED | FLAT) == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "suffix", "values"),
    [(n, s, v) for n, v in NESTED.items() for s in (".jsonl", ".json", ".parquet")]
    + [(n, s, v) for n, v in FLAT.items() for s in (".jsonl", ".json", ".parquet", ".csv")],
)
def test_parse_rows_reads_each_format_from_each_file_kind(
    tmp_path: Path, suffix: str, name: str, values: dict[str, Any]
) -> None:
    path = store(tmp_path / f"rows{suffix}", [values, values])
    table = open_table(source_at(path))
    found = parse_rows(table)
    assert found[1].format == name
    rows = usable(found)
    place = f"{path}:2" if suffix == ".jsonl" else f"{path} row 2"
    question, answer = ("q\nA. a\nB. b", "B") if name == "multiple_choice" else ("q", "a")
    messages = (Message(S, "s"), Message(U, question), Message(A, answer))
    assert rows[1] == (Row(place, (), "q") if name == "text" else Row(place, messages))
    assert len(rows) == 2


def test_row_prompt_is_all_that_precedes_the_last_answer() -> None:
    row = parsed({"messages": turns((S, "s"), (U, "q"), (A, "a"), (U, "r"), (A, "b"))})
    assert (row.prompt, row.answer) == ("s\nq\na\nr", "b")
    text = parsed({"text": "once"})
    assert (text.prompt, text.answer) == ("once", "")


@pytest.mark.parametrize(
    "row", [Row("f:1", (Message(U, "q"), Message(A, "ä"))), Row("f:2", text="once")]
)
def test_row_from_json_reads_back_what_as_json_wrote(row: Row) -> None:
    assert row_from_json(json.loads(json.dumps(row.as_json()))) == row


# --- format and columns ---


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_detect_format_finds_the_format_whose_columns_are_there(name: str) -> None:
    needed, optional = FORMATS[name]
    values = dict.fromkeys((*needed, *optional, "id"), "x")
    assert parse_rows(table_of(values))[1].format == name


def test_detect_format_goes_by_renamed_columns() -> None:
    table = table_of({"question": "q", "text": "a"})
    columns = {"prompt": "question", "completion": "text"}
    assert parse_rows(table, "auto", columns)[1].format == "prompt_completion"


def test_detect_format_names_the_columns_when_none_fits() -> None:
    assert error_of({"question": "q", "answer": "a"}) == (
        "t.jsonl: found the columns question, answer, which fit no known format."
        f" Allowed: {ALLOWED_FORMATS}. Name yours with data.columns, such as"
        " {prompt: question, completion: answer}"
    )


def test_detect_format_names_the_formats_when_several_fit() -> None:
    assert error_of({"prompt": "q", "completion": "a", "text": "t"}) == (
        "t.jsonl: found the columns prompt, completion, text, which fit several formats:"
        " prompt_completion, text. Set data.format to one"
    )


def test_parse_rows_takes_the_named_format_when_several_fit() -> None:
    values = {"prompt": "q", "completion": "a", "text": "t"}
    assert parsed(values, "text").text == "t"
    assert pairs_of(parsed(values, "prompt_completion")) == [(U, "q"), (A, "a")]


@pytest.mark.parametrize("format_name", ["auto", "prompt_completion"])
def test_parse_rows_reads_renamed_columns(format_name: str) -> None:
    table = table_of({"question": "q", "answer": "a", "role": "s"})
    columns = {"prompt": "question", "completion": "answer", "system": "role"}
    (row,) = usable(parse_rows(table, format_name, columns, None))
    assert pairs_of(row) == [(S, "s"), (U, "q"), (A, "a")]


def test_parse_rows_can_swap_two_columns() -> None:
    table = table_of({"prompt": "a", "completion": "q"})
    renamed = {"prompt": "completion", "completion": "prompt"}
    (row,) = usable(parse_rows(table, "auto", renamed, None))
    assert pairs_of(row) == [(U, "q"), (A, "a")]


@pytest.mark.parametrize(
    ("columns", "missing"),
    [
        ({}, "completion"),
        ({"completion": "anser"}, "anser"),
        ({"completion": "answer", "system": "persona"}, "persona"),
    ],
)
def test_parse_rows_names_a_missing_column_and_the_present_ones(
    columns: dict[str, str], missing: str
) -> None:
    text = error_of(
        {"prompt": "q", "answer": "a"}, format_name="prompt_completion", columns=columns
    )
    assert text == (
        f"t.jsonl: the column {missing!r} is missing; found: prompt, answer. The format"
        " prompt_completion needs prompt, completion; name yours with data.columns, such as"
        " {prompt: prompt}"
    )


def test_parse_rows_names_a_renaming_that_the_format_does_not_know() -> None:
    text = error_of(
        {"prompt": "q", "completion": "a"},
        format_name="prompt_completion",
        columns={"promt": "prompt"},
    )
    assert text == (
        "data.columns: 'promt' is not a column of the format prompt_completion; allowed: prompt,"
        " completion, reasoning_content, system, tools, weight"
    )


# --- system messages ---


def test_parse_rows_adds_the_system_message_only_where_a_row_brings_none() -> None:
    table = table_of(
        {"messages": turns((U, "q"), (A, "a"))}, {"messages": turns((S, "own"), (U, "q"), (A, "a"))}
    )
    rows = usable(parse_rows(table, "auto", {}, "given"))
    assert [pairs_of(row)[0] for row in rows] == [(S, "given"), (S, "own")]
    assert [len(row.messages) for row in rows] == [3, 3]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "completion": "a", "system": "own"},
        {"instruction": "q", "output": "a", "system": "own"},
        {
            "system": "own",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
    ],
)
def test_parse_rows_keeps_the_system_column_over_the_given_message(values: dict[str, Any]) -> None:
    assert pairs_of(parsed(values, system="given")) == [(S, "own"), (U, "q"), (A, "a")]


def test_parse_rows_adds_no_system_message_to_raw_text() -> None:
    assert parsed({"text": "once"}, system="given") == Row("t.jsonl:1", (), "once")


def test_parse_rows_reads_the_system_column_beside_message_lists() -> None:
    values = {"prompt": turns((U, "q")), "completion": turns((A, "a")), "system": "s"}
    assert pairs_of(parsed(values)) == [(S, "s"), (U, "q"), (A, "a")]


# --- malformed rows ---


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "is null; text is expected"),
        (7, "is int 7; text is expected"),
        (0.5, "is float 0.5; text is expected"),
        (True, "is bool true; text is expected"),
        ({"a": 1}, 'is dict {"a": 1}; text is expected'),
        ("", "is blank; text is expected"),
        (" \n\t", "is blank; text is expected"),
        (HALF_PAIR, "holds half a surrogate pair, which is not valid Unicode text"),
    ],
)
@pytest.mark.parametrize(
    ("place", "shape"),
    [
        ("prompt", lambda v: {"prompt": v, "completion": "a"}),
        ("completion", lambda v: {"prompt": "q", "completion": v}),
        ("instruction", lambda v: {"instruction": v, "output": "a"}),
        ("output", lambda v: {"instruction": "q", "input": "i", "output": v}),
        ("text", lambda v: {"text": v}),
        ("messages[1].content", lambda v: {"messages": turns((U, "q"), (A, v))}),
        (
            "conversations[0].value",
            lambda v: {"conversations": [{"from": "human", "value": v}]},
        ),
    ],
)
def test_parse_rows_names_content_that_is_no_text(
    value: Any, fault: str, place: str, shape: Any
) -> None:
    assert error_of(shape(value)) == f"t.jsonl:1: {place} {fault}"


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (7, "is int 7; text is expected"),
        (0, "is int 0; text is expected"),
        (HALF_PAIR, "holds half a surrogate pair, which is not valid Unicode text"),
        (["s"], 'is list ["s"]; text is expected'),
    ],
)
@pytest.mark.parametrize(
    ("column", "rest"),
    [
        ("input", {"instruction": "q", "output": "a"}),
        ("system", {"instruction": "q", "output": "a"}),
        ("system", {"prompt": "q", "completion": "a"}),
        (
            "system",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ),
    ],
)
def test_parse_rows_names_an_optional_column_that_is_no_text(
    value: Any, fault: str, column: str, rest: dict[str, Any]
) -> None:
    assert error_of({**rest, column: value}) == f"t.jsonl:1: {column} {fault}"


def test_content_is_read_from_a_file_with_its_lone_surrogate(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a \\ud83d b"}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        usable(parse_rows(open_table(source_at(path))))
    assert str(caught.value) == (
        f"{path}:2: text holds half a surrogate pair, which is not valid Unicode text\n{POLICY}"
    )


UNANSWERED = "messages ends without an assistant turn, so there is nothing to learn; add the answer"


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "messages is list []; a list of turns is expected"),
        (None, "messages is null; a list of turns is expected"),
        (
            "hello",
            "messages is 'hello', which is not JSON: Expecting value: line 1 column 1 (char 0)",
        ),
        (["hi"], "messages[0] is 'hi'; an object with role and content is needed"),
        ([{"role": "user"}], "messages[0].content is null; text is expected"),
        ([{"content": "q"}], "messages[0] has content; role and content are needed"),
        (
            turns((U, "q"), ("tool", "t")),
            "messages has the roles user, tool; user and assistant must alternate, after at most one"
            " system message, and a tool answers an assistant",
        ),
        (turns((3, "q")), f"messages[0].role is int 3; allowed: {', '.join(ROLES)}"),  # type: ignore[arg-type]
        (turns(("bot", "q")), f"messages[0].role is 'bot'; allowed: {', '.join(ROLES)}"),
        (
            turns((U, "q"), (U, "r"), (A, "a")),
            "messages has the roles user, user, assistant; user and assistant must alternate, after"
            " at most one system message. data.repair=[merge_turns] joins neighbours",
        ),
        (
            turns((A, "a")),
            "messages has the roles assistant; user and assistant must alternate, after at most one"
            " system message. data.repair=[drop_leading_assistant] leaves its greeting out",
        ),
        (
            turns((S, "s"), (S, "t"), (U, "q"), (A, "a")),
            "messages has the roles system, system, user, assistant; user and assistant must"
            " alternate, after at most one system message. Move it to the front, or set"
            " data.on_malformed=drop",
        ),
        (
            turns((U, "q"), (S, "s"), (A, "a")),
            "messages has the roles user, system, assistant; user and assistant must alternate,"
            " after at most one system message. Move it to the front, or set data.on_malformed=drop",
        ),
        (
            turns((U, "q"), (A, "a"), (U, "r")),
            f"{UNANSWERED}, or set data.repair=[drop_trailing_user]",
        ),
        (turns((U, "q")), UNANSWERED),
        (turns((S, "s")), UNANSWERED),
    ],
)
def test_parse_rows_names_a_conversation_that_cannot_be_learnt(messages: Any, fault: str) -> None:
    assert error_of({"messages": messages}) == f"t.jsonl:1: {fault}"


def test_parse_rows_names_a_sharegpt_role_it_does_not_know() -> None:
    values = {"conversations": [{"from": "human", "value": "q"}, {"from": "bing", "value": "a"}]}
    assert error_of(values) == (
        f"t.jsonl:1: conversations[1].from is 'bing'; allowed: {', '.join(ROLES)}"
    )


def test_parse_rows_refuses_a_message_list_beside_text() -> None:
    assert error_of({"prompt": turns((U, "q")), "completion": "a"}) == (
        't.jsonl:1: prompt is list [{"role": "user", "content": "q"}]; text is expected'
    )


def test_parse_rows_refuses_an_empty_completion_list() -> None:
    text = error_of({"prompt": turns((U, "q"), (A, "a")), "completion": []})
    assert text.startswith("t.jsonl:1: completion ")


def test_parse_rows_names_the_column_of_a_bad_message_list() -> None:
    text = error_of({"prompt": turns((U, "q")), "completion": turns((A, None))})
    assert text == "t.jsonl:1: completion[0].content is null; text is expected"


def test_parse_rows_names_several_rows_at_once() -> None:
    good = {"prompt": "q", "completion": "a"}
    text = error_of(good, {"prompt": None, "completion": "a"}, good, {"prompt": "q"})
    assert text.splitlines() == [
        "t.jsonl:2: prompt is null; text is expected",
        "t.jsonl:4: completion is null; text is expected",
    ]


def test_parse_rows_names_ten_rows_and_counts_the_rest() -> None:
    lines = error_of(*[{"text": ""}] * 13).splitlines()
    assert lines[:10] == [f"t.jsonl:{n}: text is blank; text is expected" for n in range(1, 11)]
    assert lines[10:] == ["… and 3 more rows"]
    assert "more" not in error_of(*[{"text": ""}] * 10)


# --- questions with choices, nested columns ---

CHOICES = ["Brest", "Vigo", "7"]
ASKED = (U, "Where?\nA. Brest\nB. Vigo\nC. 7")


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (CHOICES, 1, "B"),
        (CHOICES, "1", "B"),
        (CHOICES, "b".upper(), "B"),
        (CHOICES, "Vigo", "B"),
        (["Brest", "Vigo", 7], 0, "A"),
        (["Brest", "Vigo", 7], "7", "C"),
        (json.dumps(CHOICES), "C", "C"),
        ({"text": CHOICES, "label": ["1", "2", "3"]}, "1", "A"),
        ({"text": CHOICES, "label": ["A", "B", "C"]}, "C", "C"),
    ],
)
def test_choices_are_lettered_and_the_letter_is_learnt(
    choices: Any, answer: Any, letter: str
) -> None:
    row = parsed({"question": "Where?", "choices": choices, "answer": answer})
    assert pairs_of(row) == [ASKED, (A, letter)]


@pytest.mark.parametrize(
    ("choices", "answer", "fault"),
    [
        (CHOICES, 3, "answer is int 3; one of A to C, 0 to 2, or the text of a choice is expected"),
        (CHOICES, "Rome", "answer is 'Rome'; one of A to C, 0 to 2"),
        (["x", "x"], "x", "answer is 'x'; one of A to B, 0 to 1"),
        (["one"], 0, "a list of 2 to 26 texts is expected"),
        ("Brest or Vigo", 0, "choices is 'Brest or Vigo', which is not JSON"),
        (["a", " "], 0, "choices[1] is blank"),
        (CHOICES, None, "answer is null"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(
    choices: Any, answer: Any, fault: str
) -> None:
    values = {"question": "Where?", "choices": choices, "answer": answer}
    assert fault in error_of(values, format_name="multiple_choice")


def test_dots_lead_into_nested_columns_and_the_rest_is_counted() -> None:
    rows: list[dict[str, Any]] = [
        {"q": {"text": "Where?", "id": 7}, "answers": {"text": ["Brest", "Vigo"], "start": [3, 9]}},
        {"q": {"text": "When?"}, "answers": {"text": ["Now"]}},
    ]
    columns = {"prompt": "q.text", "completion": "answers.text.0"}
    found, rows_parsed = parse_rows(table_of(*rows), "auto", columns)
    assert rows_parsed.format == "prompt_completion"
    assert [pairs_of(row) for row in found.rows] == [
        [(U, "Where?"), (A, "Brest")],
        [(U, "When?"), (A, "Now")],
    ]
    ignored = {"q.id": 1, "answers.text.1": 1, "answers.start": 1}
    assert dict(rows_parsed.account.ignored) == ignored
    missing = error_of(rows[0], format_name="prompt_completion", columns={"prompt": "q.txt"})
    assert "the column 'completion' is missing" in missing
    none = error_of(rows[1], columns={"prompt": "q.text", "completion": "answers.text.1"})
    assert none == "t.jsonl:1: completion is null; text is expected"


# --- answers that are judged ---


def test_answers_that_are_judged_are_not_learnt_as_if_all_were_good() -> None:
    row = {"messages": turns((U, "q"), (A, "a"))}
    assert "'label': bool false; it says which answers are good" in error_of(
        {**row, "label": False}
    )
    found, accounted = parse_rows(table_of({**row, "label": 3}))
    assert (len(found.rows), dict(accounted.account.ignored)) == (1, {"label": 1})


def test_the_chosen_answer_is_learnt_only_when_it_is_named() -> None:
    row = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    assert "preferences are not trained on; name the answer" in error_of(row)
    columns = {"prompt": "conversations", "completion": "chosen"}
    found, accounted = parse_rows(table_of(row), "auto", columns)
    assert pairs_of(found.rows[0]) == [(U, "q"), (A, "good")]
    assert dict(accounted.account.ignored) == {"rejected": 1}
    texts = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    found, _ = parse_rows(table_of(texts), "auto", {"completion": "chosen"})
    assert pairs_of(found.rows[0]) == [(U, "q"), (A, "good")]


def test_nested_columns_are_found_in_late_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.data.rows.HEAD_ROWS", 2)
    rows: list[dict[str, Any]] = [{"prompt": f"q{n}", "completion": "a"} for n in range(5)]
    rows.append({"prompt": "late", "completion": "x", "meta": {"w": 5}})
    found, _ = parse_rows(table_of(*rows), "auto", {"weight": "meta.w"})
    assert [row.weight for row in found.rows] == [1, 1, 1, 1, 1, 5]
    assert "names 'meta.wieght', which no row has" in error_of(
        rows[-1], columns={"weight": "meta.wieght"}
    )


@pytest.mark.parametrize(
    ("answer", "letter"), [("2", None), (2, "C"), ("4", "D"), ("B", "B"), ("0", "A")]
)
def test_an_answer_that_names_two_choices_is_refused(answer: Any, letter: str | None) -> None:
    row = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": answer}
    if letter is None:
        assert "the name of one choice and the text of another" in error_of(row)
    else:
        assert parsed(row).messages[1].content == letter


@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_a_verdict_on_an_answer_is_refused_however_it_is_written(label: Any) -> None:
    assert "as in KTO" in error_of({"prompt": "q", "completion": "a", "label": label})
    assert parsed({"prompt": "q", "completion": "a", "label": "card_arrival"})
