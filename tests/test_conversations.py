"""Conversations as data sets write them: every key is honoured, refused by name, or counted as ignored."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prepare import data_of
from test_template_kinds import CASES, renderer_of_kind, shown
from toys import Read, chatml_tokenizer, parse_rows, table_of, write_rows

from halfbyte.config.dataset import Data
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message, Row, ToolCall, row_from_json
from halfbyte.data.encoded import IGNORED, Encoded
from halfbyte.data.fields import Account
from halfbyte.data.ledger import Ledger
from halfbyte.data.prepare import prepare
from halfbyte.data.render import Renderer
from halfbyte.data.turn_order import NEXT_ROLES
from halfbyte.errors import DataError


def read(
    *rows: dict[str, Any], repairs: tuple[str, ...] = (), system: str | None = None
) -> tuple[Read, Account]:
    """The rows, and what happened to their keys."""
    found, parsed = parse_rows(table_of(*rows, name="t"), "auto", {}, system, repairs)
    return found, parsed.account


def one(row: dict[str, Any], **options: Any) -> Row:
    parsed, _ = read(row, **options)
    assert not parsed.malformed, parsed.malformed
    (result,) = parsed.rows
    assert isinstance(result, Row)
    return result


def fault(row: dict[str, Any], **options: Any) -> str:
    (error,) = read(row, **options)[0].malformed
    assert len(str(error)) <= 300
    return str(error)


def turn(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


ASK, ANSWER = turn("user", "Tide in Brest?"), turn("assistant", "5 m.")
FUNCTION = {"name": "tide", "description": "Tides.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
PORT = {"port": "Brest"}
CALLED = (
    Message("user", "Tide in Brest?"),
    Message("assistant", "", tool_calls=(ToolCall("tide", '{"port": "Brest"}'),)),
    Message("tool", "5"),
    Message("assistant", "5 m."),
)


# --- tools ---


@pytest.mark.parametrize(
    "calling",
    [
        turn(
            "assistant",
            None,
            tool_calls=[{"type": "function", "function": {"name": "tide", "arguments": PORT}}],
        ),
        turn(
            "assistant",
            "",
            tool_calls=[{"function": {"name": "tide", "arguments": json.dumps(PORT)}}],
        ),
        turn("assistant", None, tool_calls=json.dumps([{"name": "tide", "arguments": PORT}])),
        turn("assistant", None, function_call={"name": "tide", "arguments": json.dumps(PORT)}),
        {"from": "function_call", "value": json.dumps({"name": "tide", "arguments": PORT})},
        turn("tool_call", json.dumps({"name": "tide", "arguments": PORT})),
    ],
)
@pytest.mark.parametrize(
    "tools", [[TOOL], TOOL, [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION])]
)
def test_calls_and_tools_of_every_shape_are_alike(calling: dict[str, Any], tools: Any) -> None:
    output = {"from": "observation", "value": "5"} if "from" in calling else turn("tool", "5")
    row = one({"messages": [ASK, calling, output, ANSWER], "tools": tools})
    assert row.messages == CALLED
    assert json.loads(row.tools) == [TOOL]
    assert row_from_json(json.loads(json.dumps(row.as_json()))) == row


def test_parallel_calls_in_turns_of_their_own_are_one_turn() -> None:
    calls = [
        turn("tool_call", json.dumps({"name": "tide", "arguments": {"port": port}}))
        for port in "ab"
    ]
    outputs = [turn("tool_response", text) for text in "12"]
    row = one({"messages": [ASK, *calls, *outputs, ANSWER]})
    assert [call.arguments for call in row.messages[1].tool_calls] == [
        '{"port": "a"}',
        '{"port": "b"}',
    ]
    assert [message.role for message in row.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"messages": [ASK, turn("assistant", None, tool_calls=[{"id": "1"}])]},
            "messages[1].tool_calls has dict",
        ),
        ({"messages": [ASK, turn("assistant", None, tool_calls="tide()")]}, "which is not JSON"),
        (
            {
                "messages": [
                    ASK,
                    turn("assistant", None, tool_calls=[{"name": "t", "arguments": "[1]"}]),
                ]
            },
            "has arguments list [1]; an object, or the JSON text of one",
        ),
        (
            {"messages": [turn("user", "x", tool_calls=[{"name": "t"}]), ANSWER]},
            "only an assistant has them",
        ),
        ({"messages": [ASK, ANSWER], "tools": [{"function": {}}]}, "tools has dict"),
        ({"messages": [ASK, ANSWER], "tools": "none"}, "tools is 'none', which is not JSON"),
        ({"messages": [ASK, turn("tool", "5")]}, "user, tool; user and assistant must alternate"),
        (
            {"messages": [ASK, turn("assistant", None)]},
            "messages[1].content is null; text is expected",
        ),
    ],
)
def test_a_malformed_tool_turn_is_named(row: dict[str, Any], text: str) -> None:
    assert text in fault(row)


# --- thoughts and parts ---


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_beside_content_are_kept(key: str) -> None:
    row = one({"messages": [ASK, turn("assistant", "5 m.", **{key: "High tide."})]})
    assert row.messages[-1] == Message("assistant", "5 m.", "High tide.")
    parts = [{"type": "thinking", "thinking": "High tide."}, {"type": "text", "text": "5 m."}]
    assert one({"messages": [ASK, turn("assistant", parts)]}).messages == row.messages


def test_thoughts_of_a_column_are_those_of_the_answer() -> None:
    row = one({"prompt": "2 + 2?", "completion": "4", "reasoning_content": "Two and two."})
    assert row.messages[-1] == Message("assistant", "4", "Two and two.")
    renderer = renderer_of_kind("qwen3")
    assert "‹<think>\nTwo and two.\n</think>\n\n4<|im_end|>›" in shown(
        "qwen3", renderer.encode_row(row)
    )


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [turn("user", "x", thinking="y"), ANSWER]}, "is a user turn with thoughts"),
        (
            {"messages": [ASK, turn("assistant", "<think>a</think>b", reasoning="a")]},
            "has thoughts in its content and beside it",
        ),
        (
            {"messages": [ASK, turn("assistant", "5", reasoning="a", thinking="b")]},
            "has different reasoning_content and thinking".replace("reasoning_content", "thinking"),
        ),
        ({"prompt": "q", "completion": "a", "thinking": "t"}, "has 'thinking': 't'; write it into"),
        ({"messages": [ASK, ANSWER], "reasoning": "t"}, "has 'reasoning': 't'; write it into"),
    ],
)
def test_thoughts_out_of_place_are_refused(row: dict[str, Any], text: str) -> None:
    message = fault(row)
    assert text in message or "has different" in message


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_parts_other_than_text_are_refused_by_name(kind: str) -> None:
    part = {"type": kind, kind: "data:" + "x" * 10_000}
    assert "only parts of type text" in fault({"messages": [turn("user", [part]), ANSWER]})


def test_text_parts_are_joined_as_in_the_server() -> None:
    parts = [{"type": "text", "text": "Tide "}, {"type": "text", "text": "in Brest?"}]
    assert one({"messages": [turn("user", parts), ANSWER]}).messages[0].content == "Tide in Brest?"


# --- what is learnt ---


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_weight", "trainable"])
@pytest.mark.parametrize("no", [0, False, "0", 0.0])
def test_an_answer_of_weight_0_is_context(key: str, no: Any) -> None:
    turns = [
        ASK,
        turn("assistant", "WRONG", **{key: no}),
        turn("user", "No."),
        turn("assistant", "5 m.", **{key: 1}),
    ]
    row = one({"messages": turns})
    assert [message.learnt for message in row.messages] == [True, False, True, True]
    renderer = Renderer(chatml_tokenizer())
    encoded = renderer.encode_row(row)
    learnt = [label for label in encoded.labels if label != IGNORED]
    assert renderer.tokenizer.decode(learnt) == "5 m.<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([ASK, turn("assistant", "5", weight=0.5)], "has the weight float 0.5; allowed: 0 or 1"),
        ([ASK, turn("assistant", "5", weight=1, train=False)], "has different weight and train"),
        ([turn("user", "x", train=True), ANSWER], "but is a user turn"),
        (
            [ASK, turn("assistant", "5", mask=1)],
            "has 'mask': int 1; say what is learnt by a weight",
        ),
        ([ASK, turn("assistant", "5", train_detail=[1])], "has 'train_detail'"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(turns: list[Any], text: str) -> None:
    assert text in fault({"messages": turns})


def test_a_row_without_an_answer_to_learn_is_malformed() -> None:
    row = one({"messages": [ASK, turn("assistant", "5", weight=0)]})
    with pytest.raises(DataError, match="no answer is to be learnt"):
        Renderer(chatml_tokenizer()).encode_row(row)


@pytest.mark.parametrize("loss_on", ["completion", "last", "all"])
def test_loss_on_says_which_answers_are_learnt(loss_on: str) -> None:
    encoded = Renderer(chatml_tokenizer(), loss_on=loss_on).encode_row(CASES["two"])
    tokenizer = chatml_tokenizer()
    text = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    expected = {
        "completion": "Brest<|im_end|>Vigo<|im_end|>",
        "last": "Vigo<|im_end|>",
        "all": str(tokenizer.decode(encoded.ids[1:])),
    }
    assert text == expected[loss_on]


def test_loss_on_all_refuses_a_weight_of_0() -> None:
    with pytest.raises(DataError, match=r"data\.loss_on=all learns every token"):
        Renderer(chatml_tokenizer(), loss_on="all").encode_row(CASES["weights"])


@pytest.mark.parametrize(
    ("written", "weight"), [(0.1, 0.1), ("0.25", 0.25), (3, 3.0), (None, 1.0), (math.nan, 1.0)]
)
def test_a_weight_of_a_row_is_kept(written: Any, weight: float) -> None:
    row = one({"prompt": "q", "completion": "a", "weight": written})
    assert row.weight == weight
    assert row_from_json(row.as_json()) == row


@pytest.mark.parametrize("written", [-1, True, "much", math.inf, [1]])
def test_a_weight_that_is_no_number_is_refused(written: Any) -> None:
    assert "a number of at least 0 is expected" in fault(
        {"prompt": "q", "completion": "a", "weight": written}
    )


# --- blank, ignored, repaired, dropped ---


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn("system", ""), ASK, ANSWER]},
        {"messages": [turn("system", None), ASK, ANSWER]},
        {"system": " ", "conversations": [ASK, ANSWER]},
        {"conversations": [{"from": "system", "value": "\n"}, ASK, ANSWER]},
        {"instruction": "Tide in Brest?", "input": " ", "output": "5 m.", "system": math.nan},
        {"instruction": "Tide in Brest?", "input": "<noinput>", "output": "5 m."},
        {"prompt": "Tide in Brest?", "completion": "5 m.", "system": None, "tools": []},
    ],
)
def test_nothing_is_nothing_however_it_is_written(row: dict[str, Any]) -> None:
    assert [(m.role, m.content) for m in one(row).messages] == [
        ("user", "Tide in Brest?"),
        ("assistant", "5 m."),
    ]
    assert one(row, system="Be brief.").messages[0] == Message("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [turn("system", "", mask=1), ASK, ANSWER]}, "has 'mask'"),
        ({"messages": [turn("system", "s", tools=[TOOL]), ASK, ANSWER]}, "has 'tools'"),
        ({"messages": [turn("user", [{"text": "x", "image": "cat.png"}]), ANSWER]}, "has 'image'"),
        (
            {"messages": [ASK, ANSWER], "tools": [{"name": "f", "description": "\ud83d"}]},
            "surrogate",
        ),
        (
            {
                "messages": [
                    ASK,
                    turn("assistant", "", tool_calls=[{"name": "f", "arguments": {"a": "\ud83d"}}]),
                ]
            },
            "surrogate",
        ),
        (
            {"messages": {"role": ["user", "assistant"], "content": ["x"]}},
            "lists of unequal lengths",
        ),
        (
            {"prompt": "q", "completion": "a", "weight": 10**400},
            "a number of at least 0 is expected",
        ),
    ],
)
def test_nothing_hides_in_odd_places(row: dict[str, Any], text: str) -> None:
    assert text in fault(row)


def test_a_blank_part_is_no_system_message() -> None:
    system = turn("system", [{"type": "text", "text": ""}])
    assert len(one({"messages": [system, ASK, ANSWER]}).messages) == 2


def test_keys_without_meaning_are_counted() -> None:
    rows = [
        {"id": n, "source": "web", "messages": [turn("user", "x", ts=n or None), ANSWER]}
        for n in range(3)
    ]
    assert dict(read(*rows)[1].ignored) == {"id": 3, "source": 3, "messages.ts": 2}


@pytest.mark.parametrize(
    "key",
    [
        "image",
        "images",
        "audio",
        "tool_calls",
        "functions",
        "history",
        "rejected",
        "mask",
        "loss",
        "train",
    ],
)
def test_columns_that_would_change_what_is_learnt_are_refused(key: str) -> None:
    assert f"has {key!r}: int 7; " in fault({"prompt": "q", "completion": "a", key: 7})


@pytest.mark.parametrize(
    ("turns", "repair", "roles"),
    [
        ([ASK, turn("user", "One word."), ANSWER], "merge_turns", ["user", "assistant"]),
        (
            [turn("assistant", "Hello!"), ASK, ANSWER],
            "drop_leading_assistant",
            ["user", "assistant"],
        ),
        (
            [turn("system", "s"), turn("assistant", "Hello!"), ASK, ANSWER],
            "drop_leading_assistant",
            ["system", "user", "assistant"],
        ),
        ([ASK, ANSWER, turn("user", "Thanks!")], "drop_trailing_user", ["user", "assistant"]),
        ([turn("system", "None"), ASK, ANSWER], "blank_system", ["user", "assistant"]),
    ],
)
def test_repairs_are_named_in_the_error_and_counted(
    turns: list[Any], repair: str, roles: list[str]
) -> None:
    if repair != "blank_system":
        assert repair in fault({"messages": turns})
    parsed, account = read({"messages": turns}, repairs=(repair,))
    assert [message.role for message in parsed.rows[0].messages] == roles
    assert {name: count for name, count in account.repaired.items() if count} == {repair: 1}
    _, good = read({"messages": [ASK, ANSWER]}, repairs=(repair,))
    assert not any(good.repaired.values())


def test_malformed_rows_are_dropped_by_reason_if_asked(tmp_path: Path) -> None:
    good = {"messages": [ASK, ANSWER]}
    bad = [{"messages": [ASK]}] * 12 + [{"messages": [ASK, turn("assistant", "")]}]
    path = write_rows(tmp_path / "train.jsonl", [good, *bad])
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"messages": [}\n')
    renderer = Renderer(chatml_tokenizer())
    with pytest.raises(
        DataError, match=r"… and 4 more rows\nMend the data.*data\.on_malformed=drop"
    ):
        prepare(data_of(path), renderer)
    ledger = prepare(data_of(path, on_malformed="drop"), renderer).ledger
    assert ledger.dropped == {
        "malformed: not valid JSON": 1,
        "malformed: no assistant turn at the end": 12,
        "malformed: messages.content is blank": 1,
    }
    assert ledger.dropped_places["malformed: no assistant turn at the end"] == [
        f"{path}:{n}" for n in range(2, 12)
    ]
    assert (ledger.rows_in, ledger.trained) == ({"train": 15}, 1)
    assert Ledger.model_validate(ledger.as_json()) == ledger


def test_the_system_message_and_the_tools_are_part_of_the_prompt() -> None:
    ask = {"messages": [turn("system", "Invoice 1"), ASK, ANSWER]}
    assert one(ask).prompt != one({"messages": [turn("system", "Invoice 2"), ASK, ANSWER]}).prompt
    assert (
        one({"messages": [ASK, ANSWER], "tools": [TOOL]}).prompt
        != one({"messages": [ASK, ANSWER]}).prompt
    )


def test_the_system_message_of_the_config_tells_no_rows_apart(tmp_path: Path) -> None:
    rows = [{"prompt": f"Tide in port {n}?", "completion": f"{n} m."} for n in range(40)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    renderer = Renderer(chatml_tokenizer())
    plain = prepare(data_of(path, test_frac=0.25), renderer)
    beside = prepare(data_of(path, test_frac=0.25, system="Be brief."), renderer)
    assert [e.row.place for e in beside.test] == [e.row.place for e in plain.test]
    own = one({"messages": [turn("system", "Be brief."), ASK, ANSWER]})
    assert own.prompt_beside({"Be brief."}) == "Tide in Brest?"
    assert own.prompt_beside({"Be exact."}) == own.prompt


def test_rows_of_one_prompt_are_split_by_their_answers(tmp_path: Path) -> None:
    rows = [{"prompt": "Write a slogan.", "completion": f"Slogan {n}"} for n in range(40)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    ledger = prepare(data_of(path, test_frac=0.25), Renderer(chatml_tokenizer())).ledger
    assert ledger.split_by == "answer"
    assert 4 <= ledger.held_out["test"] <= 16


def test_a_row_becomes_several_samples_and_is_counted_once(tmp_path: Path) -> None:
    turns = [
        turn("user", "2 + 2?"),
        turn("assistant", "4", reasoning="Two."),
        turn("user", "3 + 3?"),
        turn("assistant", "6", reasoning="Three."),
    ]
    path = write_rows(tmp_path / "train.jsonl", [{"messages": turns}, {"messages": [ASK, ANSWER]}])
    prepared = prepare(data_of(path), renderer_of_kind("qwen3"))
    ledger = prepared.ledger
    assert (ledger.trained, ledger.samples, len(prepared.train)) == (2, {"train": 3}, 3)
    assert prepared.train[0].row == prepared.train[1].row
    lengths = [len(example.encoded.ids) for example in prepared.train]
    limit = sorted(lengths)[-2]
    dropped = prepare(
        data_of(path, max_length=limit, on_overlength="drop"), renderer_of_kind("qwen3")
    )
    assert dropped.ledger.dropped_samples == {"longer than max_length": 1}
    assert (dropped.ledger.trained, dropped.ledger.dropped) == (2, {})
    again = prepare(data_of(path), renderer_of_kind("qwen3"))  # from the cache
    assert [e.encoded for e in again.train] == [e.encoded for e in prepared.train]
    assert again.train[0].row == again.train[1].row


# --- LLaMA-Factory's parts ---


def test_parts_with_values_hold_thoughts_and_calls() -> None:
    def part(kind: str, value: str) -> dict[str, Any]:
        return {"type": kind, "value": value}

    call = json.dumps({"name": "tide", "arguments": PORT})
    turns = [
        turn("user", [part("text", "Tide in Brest?")], loss_weight=0.0),
        turn("assistant", [part("reasoning", "Ask."), part("tool_call", call)], loss_weight=1.0),
        turn("tool", [part("text", "5")]),
        turn("assistant", [part("reasoning", "So."), part("text", "5 m.")], loss_weight=0.0),
        turn("user", "And now?"),
        turn("assistant", [part("tool_call", f"[{call}, {call}]")]),
        turn("tool", "5"),
        turn("tool", "5"),
        turn("assistant", "5 m."),
    ]
    messages = one({"messages": turns}).messages
    assert [message.learnt for message in messages] == [False, True, True, False, *[True] * 5]
    assert [message.reasoning for message in messages[1:4:2]] == ["Ask.", "So."]
    calls = [[(c.name, json.loads(c.arguments)) for c in m.tool_calls] for m in messages]
    assert [len(found) for found in calls] == [0, 1, 0, 0, 0, 2, 0, 0, 0]
    assert calls[1] == [("tide", PORT)]
    assert "loss_weight" in fault({"messages": [ASK, turn("assistant", "5 m.", loss_weight=0.3)]})
    both = turn("assistant", [part("tool_call", call)], tool_calls=[json.loads(call)])
    assert "tool calls in its content and beside it" in fault(
        {"messages": [ASK, both, turn("tool", "5"), ANSWER]}
    )
    assert "which is not JSON" in fault(
        {"messages": [ASK, turn("assistant", [part("tool_call", "tide(Brest)")])]}
    )


def test_hermes_writes_tools_calls_and_thoughts_for_any_tokenizer() -> None:
    renderer = Renderer(chatml_tokenizer(), load_template("hermes"))
    call = {"id": "c", "function": {"name": "tide", "arguments": PORT}}
    turns = [
        turn("system", "Be brief."),
        ASK,
        turn("assistant", "", reasoning_content="Ask.", tool_calls=[call]),
        turn("tool", "5", tool_call_id="c"),
        ANSWER,
    ]
    row = one({"messages": turns, "tools": [TOOL]})
    encoded = renderer.encode_row(row)
    text = str(renderer.tokenizer.decode(encoded.ids))
    labels = [label for label in encoded.labels if label >= 0]
    assert str(renderer.tokenizer.decode(labels)) == (
        '<think>\nAsk.\n</think>\n\n<tool_call>\n{"name": "tide", "arguments": {"port": "Brest"}}\n'
        "</tool_call><|im_end|>5 m.<|im_end|>"
    )
    assert (
        text.count("Be brief.") == text.count("<tools>\n{") == text.count("<|im_start|>system") == 1
    )
    assert "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>" in text
    prompt = renderer.encode_prompt(row.messages[:-1], "p", row.tools)
    assert encoded.ids[: len(prompt)] == prompt
    # Without tools and thoughts it is ChatML.
    plain = one({"messages": [ASK, ANSWER]})
    chatml = Renderer(chatml_tokenizer(), load_template("chatml"))
    assert renderer.encode_row(plain) == chatml.encode_row(plain)


# --- any conversation ---

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).filter(
    str.strip
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "weight": st.sampled_from([0, 1, None]),
    "reasoning_content": TEXTS | st.none(),
    "id": st.integers(),
    "note": TEXTS | st.none(),
}


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    if draw(st.booleans()):
        turns.append(turn("system", draw(TEXTS)))
    role = ""
    while role != "assistant" or (len(turns) < 8 and draw(st.booleans())):
        role = draw(st.sampled_from(NEXT_ROLES[role]))
        made = turn(role, draw(TEXTS))
        if role == "assistant":
            made |= {key: draw(values) for key, values in FIELDS.items()}
            if draw(st.booleans()):
                made["tool_calls"] = [
                    {"id": "c", "function": {"name": "f", "arguments": {"x": draw(TEXTS)}}}
                ]
        turns.append(made)
    row: dict[str, Any] = {
        "messages": turns,
        "source": draw(TEXTS),
        "weight": draw(st.sampled_from([None, 0.5, 2])),
    }
    if draw(st.booleans()):
        row["tools"] = [TOOL]
    return row


@settings(max_examples=150, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=4))
def test_any_conversation_is_accounted_for_and_learnt_as_written(raw: list[dict[str, Any]]) -> None:
    parsed, account = read(*raw)
    assert not parsed.malformed
    # Every key is used or counted.
    notes = sum(
        bool(t.get("note", "").strip()) if t.get("note") else 0
        for row in raw
        for t in row["messages"]
    )
    ids = sum("id" in t for row in raw for t in row["messages"])
    expected = {"source": len(raw), "messages.id": ids, "messages.note": notes}
    assert dict(account.ignored) == {key: count for key, count in expected.items() if count}
    renderer = renderer_of_kind("qwen3")
    alone: list[Encoded | str] = []
    for row in parsed.rows:
        try:
            alone.append(renderer.encode_row(row))
        except DataError as error:
            alone.append(str(error))
    for row, samples, single in zip(
        parsed.rows, renderer.try_rows(parsed.rows), alone, strict=True
    ):
        assert row_from_json(row.as_json()) == row
        learnt = [m for m in row.messages if m.role == "assistant" and m.learnt]
        if isinstance(samples, DataError):
            assert str(samples) == single
            assert not learnt or "drops" in str(samples)
            continue
        assert samples[0] == single
        spans = [part.split("›")[0] for s in samples for part in shown("qwen3", s).split("‹")[1:]]
        if "‹" in str(row) or "›" in str(row):
            continue
        assert len(spans) == len(learnt)
        for sample in samples:
            assert all(
                label in (IGNORED, token)
                for token, label in zip(sample.ids, sample.labels, strict=True)
            )
        for message in learnt:
            texts = [message.content.strip(), (message.reasoning or "").strip()]
            assert any(all(text in span for text in texts) for span in spans)


# Fields of the ledger that name places, or the bytes of a file.
PLACES = (
    "fingerprints",
    "dropped_places",
    "changed_by_template",
    "control_tokens_as_text",
    "near_duplicates",
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.lists(conversations(), min_size=2, max_size=6), size=st.integers(1, 3))
def test_rows_that_stream_through_files_give_what_one_batch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: list[dict[str, Any]], size: int
) -> None:
    rows = [*raw, {"messages": [ASK, ANSWER]}]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=size, ensure_ascii=size % 2 == 0))
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    found = []
    for path, limits in ((lines, (1 << 16, 1 << 26, 1 << 20)), (array, (size, 200, 7 * size))):
        monkeypatch.setattr("halfbyte.data.tokenise.BATCH_ROWS", limits[0])
        monkeypatch.setattr("halfbyte.data.row_file.MAX_KEPT_BYTES", limits[1])
        monkeypatch.setattr("halfbyte.data.files.CHUNK_BYTES", limits[2])
        data = data_of(path, cache=False, on_malformed="drop", validation_frac=0.3)
        prepared = prepare(data, renderer_of_kind("qwen3"))
        parts = [prepared.train, prepared.validation]
        ledger = prepared.ledger.as_json()
        for key in PLACES:
            ledger.pop(key, None)
        encoded = [[(e.encoded.ids, e.encoded.labels) for e in part] for part in parts]
        turns = [[replace(e.row, place="") for e in part] for part in parts]
        found.append((encoded, turns, prepared.train.weights, ledger))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "value": "Be brief."}],
        [{"type": "image_url", "image_url": {"url": "cat.png"}}],
        [{"type": "input_text", "content": "Be brief."}],
    ],
)
def test_a_system_message_in_parts_is_read_or_refused(content: Any) -> None:
    row = {"messages": [turn("system", content), ASK, ANSWER]}
    if "value" in content[0]:
        assert one(row).messages[0] == Message("system", "Be brief.")
    else:
        assert "is list" in fault(row) or "only parts of type text" in fault(row)


@pytest.mark.parametrize(
    ("calling", "text"),
    [
        (
            {"from": "function_call", "value": '{"name": "f"}', "tool_calls": [{"name": "g"}]},
            "is a tool call and has others beside it",
        ),
        (
            turn(
                "assistant", "", tool_calls=[{"name": "f", "arguments": {}, "parameters": {"b": 1}}]
            ),
            "",
        ),
        (
            turn(
                "assistant",
                "",
                tool_calls=[{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 1}}],
            ),
            "different arguments and parameters",
        ),
        (
            turn("assistant", "", tool_calls=[{"name": "g", "function": {"name": "f"}}]),
            "write it into the function alone",
        ),
        (
            turn("assistant", "", tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}]),
            "the key 'a' stands twice",
        ),
    ],
)
def test_nothing_of_a_call_vanishes(calling: dict[str, Any], text: str) -> None:
    ask = ASK if "role" in calling else {"from": "human", "value": "Tide?"}
    row = {"messages" if "role" in calling else "conversations": [ask, calling]}
    if text:
        assert text in fault(row)
    else:
        assert one(row).messages[1].tool_calls[0].arguments == '{"b": 1}'


def test_keys_of_calls_without_meaning_are_counted() -> None:
    call = {
        "id": "1",
        "type": "function",
        "index": 0,
        "cost": 3,
        "function": {"name": "f", "note": 1},
    }
    _, account = read({"messages": [ASK, turn("assistant", "", tool_calls=[call])]})
    assert sum(account.ignored.values()) == 2


def test_parallel_calls_keep_thoughts_and_agree_on_their_weight() -> None:
    def row(**second: Any) -> dict[str, Any]:
        calls = [
            {"from": "function_call", "value": '{"name": "f"}', "reasoning_content": "First."},
            {"from": "function_call", "value": '{"name": "g"}', **second},
        ]
        return {"conversations": [{"from": "human", "value": "x"}, *calls]}

    assert one(row(reasoning_content="Then.")).messages[1].reasoning == "First.\n\nThen."
    assert "have different weights" in fault(row(weight=0))


def test_a_system_message_of_a_row_and_of_the_config_are_one_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"Tide in port {n}?", "completion": f"{n} m."} for n in range(9)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", [{**rows[3], "system": "Be brief."}])
    data = Data.model_validate(
        {"train": [{"path": str(train), "system": "Be brief."}], "test": str(test), "cache": False}
    )
    with pytest.raises(DataError, match="also held out"):
        prepare(data, Renderer(chatml_tokenizer()))


def test_one_prompt_under_two_system_messages_is_split_by_answers(tmp_path: Path) -> None:
    rows = [{"prompt": "Write a poem.", "completion": f"Poem {n}"} for n in range(60)]
    sources = [
        {"path": str(write_rows(tmp_path / f"{name}.jsonl", part)), "system": name}
        for name, part in (("brief", rows[:30]), ("long", rows[30:]))
    ]
    data = Data.model_validate({"train": sources, "validation_frac": 0.2, "cache": False})
    prepared = prepare(data, Renderer(chatml_tokenizer()))
    assert prepared.ledger.split_by == "answer"
    assert 6 <= len(prepared.validation) <= 18
