"""Answers as chat templates write them: thoughts, text and calls, read whole and as they stream."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_template_kinds import KINDS, a, renderer_of_kind, u
from toys import chatml_tokenizer

from halfbyte.config.evaluation import Eval
from halfbyte.data.answer_format import AnswerFormat, AnswerReader, ParsedAnswer
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Row, ToolCall
from halfbyte.data.encoded import IGNORED
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError
from halfbyte.scoring.rows import row_scorer, tool_differences


def template_of(calls: str, thinks: str = "") -> str:
    """A ChatML template that writes calls so."""
    return (
        "{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + thinks + "{{- m.content }}"
        "{%- if m.tool_calls %}" + calls + "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


EACH = "{%- for c in m.tool_calls %}{% set f = c.function %}"
# In the manner of several families; the markup is what their documentation shows.
CALLS = {
    "list": "{{- '[CALLS]' }}{%- for c in m.tool_calls %}{{- '[' if loop.first else ', ' }}"
    "{{- {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{{- ']' if loop.last }}{% endfor %}",
    "bare": EACH + "{{- {'name': f.name, 'parameters': f.arguments} | tojson }}{% endfor %}",
    "nested": EACH
    + "{{- '<call>' + {'function': {'name': f.name, 'arguments': f.arguments | tojson}}"
    " | tojson + '</call>' }}{% endfor %}",
    "named": "{{- '<|calls|>' }}"
    + EACH
    + "{{- '<|call|>' + f.name + '<|sep|>' + f.arguments | tojson"
    " + '<|end|>' }}{% endfor %}{{ '<|calls_end|>' }}",
    "fields": EACH
    + "{{- '\n<tool_call>\n<function=' + f.name + '>\n' }}{%- for k, v in f.arguments.items() %}"
    "{{- '<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n' }}{% endfor %}"
    "{{- '</function>\n</tool_call>' }}{% endfor %}",
    "keys": EACH + "{{- '<tool_call>' + f.name }}{%- for k, v in f.arguments.items() %}"
    "{{- '<key>' + k + '</key><value>' + (v if v is string else v | tojson) + '</value>' }}{% endfor %}"
    "{{- '</tool_call>' }}{% endfor %}",
}
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {"port": {"type": "string"}, "days": {"type": "integer"}},
                    "required": ["port"],
                    "additionalProperties": False,
                },
            },
        }
        for name in ("tide", "wind")
    ]
)
ONE = [ToolCall("tide", '{"port": "Brest"}', "call00001")]
TWO = [*ONE, ToolCall("wind", '{"port": "a \\"b\\" {c} </x>", "days": 7}', "call00002")]
THINK_END = "</think>"
THINKS = "{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"


@cache
def renderer_of(kind: str) -> Renderer:
    if kind in KINDS:
        return renderer_of_kind(kind)
    tokenizer = chatml_tokenizer()
    if kind == "hermes-ours":
        return Renderer(tokenizer, load_template("hermes"))
    return Renderer(tokenizer, template_of(CALLS[kind], THINKS))


def answer_of(kind: str, row: Row) -> str:
    """What a model that has learnt the row would generate, decoded as evaluation does."""
    renderer = renderer_of(kind)
    encoded = renderer.encode_row(row)
    return renderer.decode([label for label in encoded.labels if label != IGNORED])


def streamed(form: AnswerFormat, text: str, tools: str, size: int) -> ParsedAnswer:
    """The answer as it is read in pieces of so many characters."""
    reader, parsed = (
        AnswerReader(form, tools, closer=form.closer),
        ParsedAnswer(),
    )
    for start in range(0, len(text), size):
        for piece in reader.push(text[start : start + size]):
            parsed.add(piece)
    for piece in reader.flush():
        parsed.add(piece)
    parsed.malformed = reader.malformed
    return parsed


def plain(calls: Any) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


WITH_CALLS = ["qwen3", "llama3", "mistral", "hermes", "hermes-ours", *CALLS]


@pytest.mark.parametrize("kind", WITH_CALLS)
@pytest.mark.parametrize("content", ["", "Let me look."])
@pytest.mark.parametrize("thoughts", [None, "Hm.\nWell <b>"])
@pytest.mark.parametrize(
    "calls", [ONE, TWO, [ToolCall("wind", "{}", "call00001")]], ids=["one", "two", "empty"]
)
def test_calls_are_read_back_as_templates_write_them(
    kind: str, calls: list[ToolCall], thoughts: str | None, content: str
) -> None:
    if content and kind == "bare":
        pytest.skip("nothing tells a bare object behind a text from JSON in it")
    answer = a(content, reasoning=thoughts, tool_calls=tuple(calls))
    row = Row("r", (u("Tide?"), answer), tools=TOOLS)
    if not _writes(kind, row):
        pytest.skip("the template refuses to write this answer")
    text = answer_of(kind, row)
    form = renderer_of(kind).answer_format
    for parsed in [form.parse(text, TOOLS), *(streamed(form, text, TOOLS, n) for n in (1, 3, 999))]:
        assert plain(parsed.calls) == plain(calls)
        assert (parsed.thoughts, parsed.content.strip()) == (thoughts, content)
        assert not parsed.malformed
    without = form.parse(text)
    assert not without.calls
    assert calls[0].name in without.content


def test_two_calls_are_read_wherever_a_template_writes_two() -> None:
    """So that the test above does not pass by refusals alone."""
    two = Row("r", (u("Tide?"), a("", tool_calls=tuple(TWO))), tools=TOOLS)
    assert [kind for kind in WITH_CALLS if _writes(kind, two)] == [
        kind for kind in WITH_CALLS if kind != "llama3"
    ]


def _writes(kind: str, row: Row) -> bool:
    try:
        return bool(answer_of(kind, row))
    except DataError:
        return False


TYPED = [
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "false", False),
    ({"type": ["string", "null"]}, "123", "123"),
    ({"type": ["string", "null"]}, "None", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "[1]", "[1]"),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5.5", "5.5"),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"enum": [1, 2]}, "1", 1),
    ({"type": "string"}, "None", "None"),
    ({"type": "string"}, '"a"', '"a"'),
    ({"type": "object"}, '{"a": 1}', {"a": 1}),
    ({}, "None", "None"),
    ({}, '"a"', '"a"'),
    ({}, "5", 5),
    ({"type": 7, "anyOf": 3, "enum": 4}, "1", 1),
    (True, "1", 1),
]


@pytest.mark.parametrize(("schema", "text", "value"), TYPED)
def test_a_field_has_a_type_that_its_schema_allows(schema: Any, text: str, value: Any) -> None:
    """Templates write fields without quotes, and some write True, False and None as Python does."""
    (tool, *_) = json.loads(TOOLS)
    tool["function"]["parameters"]["properties"]["k"] = schema
    answer = f"<tool_call>\n<function=tide>\n<parameter=k>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (call,) = renderer_of("fields").answer_format.parse(answer, json.dumps([tool])).calls
    assert json.dumps(json.loads(call.arguments)["k"]) == json.dumps(value)


BROKEN = [
    '<tool_call>\n{"name": "tide", "arguments": {"port": "Brest"}',
    "<tool_call>\nnot JSON\n</tool_call>",
    '<tool_call>\n{"name": "tide"}\n</tool_call>',
    '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "tide", "arguments": "Brest"}\n</tool_call>',
    "<tool_call>",
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_call_that_cannot_be_read_stays_text(text: str) -> None:
    form = renderer_of("hermes-ours").answer_format
    whole = '<tool_call>\n{"name": "tide", "arguments": {}}\n</tool_call>'
    for before, num_calls in (("", 0), ("Well. ", 0), (f"{whole}\n", 1)):
        for parsed in (form.parse(before + text, TOOLS), streamed(form, before + text, TOOLS, 1)):
            assert len(parsed.calls) == num_calls
            assert parsed.content.endswith(text)
            assert parsed.malformed


@given(st.text(), st.integers(1, 7))
def test_text_without_marks_stays_itself(text: str, size: int) -> None:
    for kind in ("hermes-ours", "keys", "gemma"):
        form = renderer_of(kind).answer_format
        assert form.parse(text).content == text
        assert streamed(form, text, "", size).content == text
        with_tools = streamed(form, text, TOOLS, size).content
        assert with_tools == text


def test_a_prompt_that_opens_thoughts_leaves_them_to_the_answer() -> None:
    form = renderer_of("deepseek_r1").answer_format
    assert form.closer == THINK_END
    for text, thoughts, content in [
        ("Two.\n</think>\n\n4", "Two.", "4"),
        ("Two and", "Two and", ""),
        ("\n</think>\n\n4", None, "4"),
    ]:
        for parsed in (form.parse(text), streamed(form, text, "", 1)):
            assert (parsed.thoughts or None, parsed.content) == (thoughts, content)


def row(*calls: ToolCall, content: str = "") -> Row:
    return Row("r", (u("Tide?"), a(content, tool_calls=calls)), tools=TOOLS)


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, json.dumps(arguments))


PAIRS = [
    # made, wanted, tool_match, tool_valid, differences
    ([call("tide", port="Brest")], [call("tide", port="Brest")], 1, 1, []),
    ([call("tide", port="brest")], [call("tide", port="Brest")], 0, 1, ["tide.port"]),
    ([call("tide", days=7, port="B")], [call("tide", port="B", days=7.0)], 1, 1, []),
    ([call("tide", port="B", days="7")], [call("tide", port="B", days=7)], 0, 0, ["tide.days"]),
    ([call("tide", port="B", days=True)], [call("tide", port="B", days=1)], 0, 0, ["tide.days"]),
    ([call("tide", port="B")], [call("tide", port="B", days=None)], 0, 1, ["tide.days"]),
    ([call("tide", port="B", at=1)], [call("tide", port="B")], 0, 0, ["tide.at"]),
    (
        [call("wind", port="B")],
        [call("tide", port="B")],
        0,
        1,
        ["no call of tide", "a call of wind"],
    ),
    (
        [call("storm", port="B")],
        [call("tide", port="B")],
        0,
        0,
        ["no call of tide", "a call of storm"],
    ),
    ([], [call("tide", port="B")], 0, 0, ["no call of tide"]),
    ([], [], 1, 1, []),
    ([call("tide", port="B")], [], 0, 1, ["a call of tide"]),
    (
        [call("wind", port="B"), call("tide", port="A")],
        [call("tide", port="A"), call("wind", port="B")],
        1,
        1,
        [],
    ),
    (
        [call("tide", port="B"), call("tide", port="A")],
        [call("tide", port="A"), call("tide", port="C")],
        0,
        1,
        ["tide.port"],
    ),
    ([call("tide", port="A")] * 2, [call("tide", port="A")], 0, 1, ["a call of tide"]),
    ([call("tide", port="A")], [call("tide", port="A")] * 2, 0, 1, ["no call of tide"]),
    ([call("tide", port="القاهرة")], [call("tide", port="القاهرة")], 1, 1, []),
    ([call("tide", port="İzmir")], [call("tide", port="Izmir")], 0, 1, ["tide.port"]),
]


@pytest.mark.parametrize(("made", "wanted", "match", "valid", "differences"), PAIRS)
def test_tool_metrics_say_what_a_reader_says(
    made: list[ToolCall],
    wanted: list[ToolCall],
    match: int,
    valid: int,
    differences: list[str],
) -> None:
    form = renderer_of("hermes-ours").answer_format
    answer = "\n".join(
        f'<tool_call>\n{{"name": "{one.name}", "arguments": {one.arguments}}}\n</tool_call>'
        for one in made
    )
    wants = row(*wanted)
    parsed = form.parse(answer, wants.tools)
    assert row_scorer("tool_match", Eval())(parsed, wants) == match
    assert row_scorer("tool_valid", Eval())(parsed, wants) == valid
    assert row_scorer("exact_match", Eval())(parsed, wants) == match
    found = tool_differences(made, wants)
    assert len(found) == len(differences)
    assert all(one.startswith(other) for one, other in zip(found, differences, strict=True))


def test_special_tokens_that_a_template_would_escape_are_refused() -> None:
    """A template that writes calls in ASCII, as Reka's does, would train on the escapes."""
    tokenizer = chatml_tokenizer()
    ascii_calls = CALLS["nested"].replace(
        "f.arguments | tojson", "f.arguments | tojson(ensure_ascii=True)"
    )
    renderer = Renderer(tokenizer, template_of(ascii_calls))
    fine = Row(
        "r", (u("Tide?"), a("", tool_calls=(ToolCall("tide", '{"port": "é"}'),))), tools=TOOLS
    )
    assert renderer.encode_row(fine).num_supervised
    call = ToolCall("tide", '{"port": "<|im_end|>"}')
    with pytest.raises(DataError, match="special token in a tool or a call"):
        renderer.encode_row(Row("r", (u("Tide?"), a("", tool_calls=(call,))), tools=TOOLS))
