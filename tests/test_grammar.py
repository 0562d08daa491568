"""Grammars of answers: what follows a schema or calls a tool is accepted, and nothing else, in each template's markup."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_answer_format import CALLS, TOOLS, answer_of, renderer_of
from test_template_kinds import a, u

from halfbyte.data.conversation import Row, ToolCall
from halfbyte.errors import DataError
from halfbyte.generate.grammar import Grammars, closed

NESTED = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "$defs": {"Place": {"type": "object", "properties": {"port": {"type": kind}}}},
                    "type": "object",
                    "properties": {"at": {"$ref": "#/$defs/Place"}, "more": {"$ref": "#"}},
                    "required": ["at"],
                },
            },
        }
        for name, kind in (("tide", "string"), ("wind", "integer"))
    ]
)


def accepts(kind: str, matcher: Any, text: str) -> bool:
    """Whether an answer follows a grammar to its end."""
    renderer = renderer_of(kind)
    marks = renderer.special_tokens
    ids: list[int] = []
    for part in marks.split(text):
        tokens = renderer.tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += [marks.ids[part]] if part in marks.ids else tokens
    for token in ids:
        if matcher.is_stopped() or not matcher.consume_token(token) or matcher.is_error():
            return False
    return bool(matcher.is_accepting())


def grammars(kind: str) -> Grammars:
    return Grammars(renderer_of(kind), len(renderer_of(kind).tokenizer))


def written(kind: str, *calls: tuple[str, str], thoughts: str | None = None) -> str:
    made = tuple(
        ToolCall(name, arguments, f"call0000{n}") for n, (name, arguments) in enumerate(calls)
    )
    answer = a("", tool_calls=made, reasoning=thoughts)
    text = answer_of(kind, Row("r", (u("Tide?"), answer), tools=TOOLS))
    return f"\n{text}" if kind == "fields" else text  # which decoding trims


RIGHT, WRONG = ("tide", '{"port": "Brest"}'), ("tide", '{"port": 7}')
FREE = ("fields", "keys", "nested")  # their arguments are text to the grammar
KINDS = ["qwen3", "llama3", "mistral", "hermes", "hermes-ours", *CALLS]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_in_a_templates_own_markup_follow_their_schemas(kind: str) -> None:
    make = grammars(kind)

    def takes(
        text: str, name: str | None = None, *, parallel: bool = True, tools: str = TOOLS
    ) -> bool:
        return accepts(kind, make.of_calls(tools, name, parallel=parallel), text)

    one = written(kind, RIGHT)
    assert takes(one)
    assert takes(one, "tide")
    assert takes(one, parallel=False)
    assert not takes(one, "wind")
    assert not takes("Brest")
    assert not takes("")
    if kind not in FREE:
        assert not takes(written(kind, WRONG))
        assert not takes(written(kind, ("tide", '{"port": "Brest", "at": 1}')))
        assert takes(written(kind, ("tide", '{"at": {"port": "B"}}')), tools=NESTED)
        assert not takes(written(kind, ("wind", '{"at": {"port": "B"}}')), tools=NESTED)
        assert takes(
            written(kind, ("wind", '{"at": {"port": 7}, "more": {"at": {}}}')), tools=NESTED
        )
    try:
        two = written(kind, RIGHT, ("wind", '{"port": "B", "days": 7}'))
    except DataError:
        return
    assert takes(two)
    if kind not in ("fields", "keys"):
        assert not takes(two, parallel=False)


SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}
ANSWER = '{"sure":true}'


@pytest.mark.parametrize("kind", ["qwen3", "hermes-ours"])
def test_an_answer_may_think_before_what_follows_a_schema(kind: str) -> None:
    """Where the template writes thoughts; vLLM issues 18255 and 47027, ollama issue 14196."""
    make = grammars(kind)
    for text, right in [
        (ANSWER, True),
        (f"<think>\nHm. {{}}\n</think>\n\n{ANSWER}", True),
        (f"<think>\nHm.\n{ANSWER}", False),
        (f"Hm. {ANSWER}", False),
        ('<think>\n\n</think>\n\n{"sure": 7}', False),
    ]:
        assert accepts(kind, make.of_schema(SCHEMA), text) is right, text
    thinking = written(kind, RIGHT, thoughts="Hm.")
    assert accepts(kind, make.of_calls(TOOLS, None, parallel=True), thinking)
    opened = make.of_calls(TOOLS, None, parallel=True, closer="</think>")
    assert accepts(kind, opened, thinking.removeprefix("<think>"))
    assert not accepts(kind, make.of_schema(SCHEMA, closer="</think>"), ANSWER)
    assert accepts(kind, make.of_schema(SCHEMA, closer="</think>"), f"Hm.</think>{ANSWER}")


def test_a_template_without_thoughts_gives_json_at_once() -> None:
    make = grammars("hermes")
    assert accepts("hermes", make.of_schema(SCHEMA), ANSWER)
    assert not accepts("hermes", make.of_schema(SCHEMA), f"<think>x</think>{ANSWER}")


def test_schemas_are_closed_where_they_do_not_say() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {"properties": {"type": "string"}}},
            "b": {"type": "object"},
            "c": {"type": "object", "properties": {}, "additionalProperties": True},
        },
        "default": {"properties": {}},
    }
    made = closed(schema)
    assert made["additionalProperties"] is made["properties"]["a"]["additionalProperties"] is False
    assert made["properties"]["b"] == {"type": "object"}
    assert made["properties"]["c"]["additionalProperties"] is True
    assert made["default"] == schema["default"]
