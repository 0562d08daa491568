"""Owns finding out how a chat template writes tool calls: by rendering some."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from halfbyte.data.answers import samples_of
from halfbyte.data.call_format import (
    IDS,
    CallFormat,
    FieldCalls,
    NamedCalls,
    ObjectCalls,
    json_or_none,
    value_at,
)
from halfbyte.data.chat_format import PLACE, ChatFormat
from halfbyte.data.conversation import Message, ToolCall
from halfbyte.data.fields import JSON
from halfbyte.data.special_tokens import pattern_of
from halfbyte.data.thoughts import split_thoughts
from halfbyte.errors import DataError

# Names that no template has, so that what stands around them is its own.
NAME, KEY, VALUE, OTHER_NAME, OTHER_KEY, NUMBER = (
    "zeta_q7",
    "iota_q7",
    "kappa_q7",
    "theta_q7",
    "nu_q7",
    70717,
)
ONE = ToolCall(NAME, json.dumps({KEY: VALUE}), IDS[0])
TWO = ToolCall(OTHER_NAME, json.dumps({OTHER_KEY: NUMBER, KEY: VALUE}), IDS[1])
NONE = ToolCall(NAME, "{}", IDS[0])
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": name,
                "parameters": {
                    "type": "object",
                    "properties": {KEY: {"type": "string"}, OTHER_KEY: {"type": "number"}},
                },
            },
        }
        for name in (NAME, OTHER_NAME)
    ]
)


def call_format(form: ChatFormat) -> CallFormat | None:
    """Return how a template writes calls; None if it writes none, or in no way that is known here."""
    if not form.template.knows_tools:
        return None
    one, two, both = (_answer(form, calls) for calls in ((ONE,), (TWO,), (ONE, TWO)))
    if one is None or two is None:
        return None
    objects = _object_calls(one, both)
    if objects or one.count(NAME) > 1:
        return objects
    return _named_calls(one, both) or _field_calls(form, one, two, both)


def _object_calls(one: str, both: str | None) -> ObjectCalls | None:
    """Return how calls are written if as JSON objects; None if they are not.

    Args:
        one: an answer with one call.
        both: an answer with two calls, None if the template refuses it.
    """
    for start, value, end in _json_values(one):
        is_list = isinstance(value, list)
        example = value[0] if is_list and len(value) == 1 else value
        name, arguments = _path(example, NAME), _path(example, {KEY: VALUE})
        if not (name and arguments):
            continue
        separator = None
        if both and both.startswith(one[:end]) and not is_list:
            others = [at for at, other, _ in _json_values(both) if _path(other, OTHER_NAME)]
            separator = both[end : others[0]] if others else None
        as_text = isinstance(value_at(example, arguments), str)
        return ObjectCalls(
            one[:start], separator, one[end:], example, name, arguments, is_list, as_text
        )
    return None


def _named_calls(one: str, both: str | None) -> NamedCalls | None:
    """Return how calls are written if as a name and the JSON of its arguments; None if they are not."""
    opening, _, rest = one.partition(NAME)
    for start, value, end in _json_values(rest):
        if value == {KEY: VALUE}:
            separator = None
            if both and OTHER_NAME in both:
                separator = both[len(opening) + len(NAME) + end : both.find(OTHER_NAME)]
            return NamedCalls(opening, separator, rest[end:], rest[:start])
    return None


def _json_values(text: str) -> Iterator[tuple[int, Any, int]]:
    """Yield the objects and lists of JSON in a text, inner ones too, with where they begin and end."""
    for match in re.finditer(r"[\[{]", text):
        with contextlib.suppress(ValueError):
            value, end = JSON.raw_decode(text, match.start())
            yield match.start(), value, end


def _field_calls(form: ChatFormat, one: str, two: str, both: str | None) -> FieldCalls | None:
    """Return how a template writes calls whose arguments are fields; None if it does not."""
    opening, _, rest = one.partition(NAME)
    first, key, after = rest.partition(KEY)
    equals, value, last = after.partition(VALUE)
    pair = re.search(
        rf"{OTHER_NAME}{re.escape(first)}{OTHER_KEY}{re.escape(equals)}{NUMBER}(.*?){KEY}{re.escape(equals)}{VALUE}",
        two,
        re.DOTALL,
    )
    if not (key and value and pair):
        return None
    separator, closing = None, ""
    if both and both.startswith(opening) and OTHER_NAME in both:
        begin = len(opening) + len(NAME) + len(first) + len(KEY) + len(equals) + len(VALUE)
        separator = both[begin : both.find(OTHER_NAME)]
        same = 0
        while same < min(len(separator), len(last)) and separator[same] == last[same]:
            same += 1
        # What stands behind each call, and what behind the last.
        last, closing, separator = last[:same], last[same:], separator[same:]
    nothing = _answer(form, (NONE,)) or ""
    empty = nothing.partition(NAME)[2].removesuffix(closing)
    return FieldCalls(opening, separator, closing, first, equals, pair.group(1), last, empty)


def _answer(form: ChatFormat, calls: tuple[ToolCall, ...]) -> str | None:
    """Return the answer that makes these calls, without its stop token; None if the template refuses."""
    messages = (Message("user", "alpha"), Message("assistant", "", tool_calls=calls))
    try:
        (sample, *_) = samples_of(form, messages, [1], PLACE, TOOLS)
    except DataError:
        return None
    span = sample.spans[-1]
    text = sample.text[span.start : span.end]
    stop = next((m for m in pattern_of(form.stops).finditer(text) if m.end() == len(text)), None)
    _, text = split_thoughts(text[: stop.start()] if stop else text)
    return text if all(call.name in text for call in calls) else None


def _path(value: Any, wanted: Any) -> tuple[str, ...]:
    """Return the keys under which a value stands in an object, () if it does not."""
    if not isinstance(value, dict):
        return ()
    for key, inner in value.items():
        if inner == wanted or (
            isinstance(inner, str) and not isinstance(wanted, str) and json_or_none(inner) == wanted
        ):
            return (key,)
        below = _path(inner, wanted)
        if below:
            return (key, *below)
    return ()
