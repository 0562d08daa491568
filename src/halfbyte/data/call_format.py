"""Owns how chat templates write tool calls, and how they are read back from an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.data.conversation import ToolCall
from halfbyte.data.fields import JSON, SURROGATES

IDS = ("call0q7a1", "call0q7b2")  # of probes; of nine characters, as Mistral's templates want
CALL_NAME = r"(?P<name>[^\s{}\[\]()<>|\"',:]+)"
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}

Schemas = Mapping[str, Any]  # name of a tool -> JSON schema of its arguments


def schemas_of(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of the arguments of each tool, by name; a tool without one takes any."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


@dataclass(frozen=True)
class CallFormat:
    """How a template writes calls: what stands before the first, between two and after the last.

    Attributes:
        opening: text before the first call.
        separator: text between two calls of one block; None if it is not known.
        closing: text after the last call, without a stop token.
    """

    opening: str
    separator: str | None
    closing: str

    @property
    def trigger(self) -> str:
        """The first word of what stands before calls, "" if nothing does."""
        return next(iter(re.split(r"[\s\d]", self.opening.strip())), "")

    def read(
        self, text: str, start: int, tools: Schemas, *, ended: bool
    ) -> tuple[list[ToolCall], int]:
        """Read the whole calls that stand in a text from ``start`` on.

        Args:
            text: an answer, or as much of it as there is.
            start: where the trigger stands.
            tools: the tools that may be called.
            ended: whether the answer has ended, so that the mark behind its last call may be missing.

        Returns:
            the calls, and where what was not read begins.
        """
        opening, closing = _lenient(self.opening), _lenient(self.closing)
        separator = None if self.separator is None else _lenient(self.separator)
        calls: list[ToolCall] = []
        end = start
        while opened := opening.match(text, end):
            entry = self.entry(text, opened.end(), tools)
            while entry is not None:
                made, at = entry
                between = separator.match(text, at) if separator else None
                entry = self.entry(text, between.end(), tools) if between else None
                closed = closing.match(text, at)
                if not (entry or between or closed or (ended and not text[at:].strip())):
                    return calls, end
                calls += made
                end = closed.end() if closed else at
            if end <= opened.start() or not self.opening.strip():
                break
        return calls, end

    def entry(self, text: str, at: int, tools: Schemas) -> tuple[list[ToolCall], int] | None:
        """Read what stands between two marks: one call, or a list of them; None if it is not whole.

        Args:
            text: an answer.
            at: where the entry begins.
            tools: the tools that may be called.

        Returns:
            the calls, and where they end.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ObjectCalls(CallFormat):
    """Calls as JSON objects that hold name and arguments, or as one list of such objects.

    Attributes:
        example: the object of a call.
        name_path: keys under which the name stands.
        arguments_path: keys under which the arguments stand.
        as_list: whether all calls are one list.
        as_text: whether the arguments are the JSON text of an object.
    """

    example: Any
    name_path: tuple[str, ...]
    arguments_path: tuple[str, ...]
    as_list: bool
    as_text: bool

    def schema(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON schema of the object of a call.

        Args:
            name: name of the tool.
            arguments: JSON schema of its arguments.
        """
        return self._schema(self.example, (), name, arguments)

    def _schema(
        self, value: Any, path: tuple[str, ...], name: str, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        if path == self.name_path:
            return {"const": name}
        if path == self.arguments_path:
            return {"type": "string"} if self.as_text else arguments
        if isinstance(value, dict):
            properties = {
                key: self._schema(inner, (*path, key), name, arguments)
                for key, inner in value.items()
            }
            return {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        if value in IDS:
            return {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
        return {"const": value}

    def entry(self, text: str, at: int, tools: Schemas) -> tuple[list[ToolCall], int] | None:
        """As ``CallFormat.entry``."""
        try:
            value, end = JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        calls = []
        for each in value if isinstance(value, list) else [value]:
            name, arguments = value_at(each, self.name_path), value_at(each, self.arguments_path)
            if isinstance(arguments, str) and self.as_text:
                arguments = json_or_none(arguments)
            known = isinstance(name, str) and (bool(self.opening.strip()) or name in tools)
            call = _call(name, arguments) if known else None
            if call is None:
                return None
            calls.append(call)
        return calls, end


@dataclass(frozen=True)
class NamedCalls(CallFormat):
    """Calls as a name, and behind a mark the JSON object of its arguments.

    Attributes:
        middle: text between the two.
    """

    middle: str

    def entry(self, text: str, at: int, tools: Schemas) -> tuple[list[ToolCall], int] | None:
        """As ``CallFormat.entry``."""
        name = re.compile(CALL_NAME + _lenient(self.middle).pattern).match(text, at)
        try:
            value, end = JSON.raw_decode(text, name.end()) if name else (None, at)
        except (ValueError, RecursionError):
            return None
        call = _call(name["name"], value) if name else None
        if name is None or call is None:
            return None
        if not self.opening.strip() and name["name"] not in tools:
            return None
        return [call], end


@dataclass(frozen=True)
class FieldCalls(CallFormat):
    """Calls as a name and marked-up fields, each a key and a value.

    Attributes:
        first: text between the name and the first key.
        equals: text between a key and its value.
        next: text between a value and the next key.
        last: text behind the last value.
        nothing: text behind a name without fields.
    """

    first: str
    equals: str
    next: str
    last: str
    nothing: str

    def entry(self, text: str, at: int, tools: Schemas) -> tuple[list[ToolCall], int] | None:
        """As ``CallFormat.entry``."""
        name = re.compile(CALL_NAME).match(text, at)
        if name is None:
            return None
        value = rf"(?P<key>[^\s<>]+?){_tight(self.equals)}(?P<value>.*?)(?:(?P<next>{_tight(self.next)})|{_tight(self.last)})"
        first, field = re.compile(_tight(self.first)), re.compile(value, re.DOTALL)
        arguments: dict[str, Any] = {}
        begun = first.match(text, name.end())
        if begun is None:
            ended = _lenient(self.nothing).match(text, name.end())
            return ([ToolCall(name["name"], "{}")], ended.end()) if ended else None
        end, more = begun.end(), True
        schema = tools.get(name["name"]) or {}
        while more:
            pair = field.match(text, end)
            if pair is None:
                return None
            arguments[pair["key"]] = _typed(pair["value"], schema, pair["key"])
            end, more = pair.end(), pair["next"] is not None
        call = _call(name["name"], arguments)
        return None if call is None else ([call], end)


def value_at(value: Any, path: tuple[str, ...]) -> Any:
    """Return what stands under keys within keys, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _call(name: str, arguments: Any) -> ToolCall | None:
    """Return a call; None if its arguments are no object, or no text."""
    text = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, dict) or SURROGATES.search(name + text):
        return None
    return ToolCall(name, text)


def json_or_none(text: str) -> Any:
    """Return the value of a JSON text, None also where it is no JSON."""
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def _typed(text: str, schema: Any, key: str) -> Any:
    """Return a field's value from its text, of a type that the schema of the arguments allows.

    Templates write strings without quotes, and some write true, false and null as Python does.
    """
    properties = schema.get("properties") if isinstance(schema, dict) else None
    types = _types(properties.get(key) if isinstance(properties, dict) else None)
    word = text.strip()
    word = PYTHON_WORDS.get(word, word) if types else word
    value = json_or_none(word)
    is_text = isinstance(value, str) or (value is None and word != "null")
    fits = any(type(value) in JSON_TYPES[name] for name in types)
    return text if is_text or ("string" in types and not fits) else value


def _types(schema: Any) -> set[str]:
    """Return the names of the types that a JSON schema allows; none if it does not say."""
    if not isinstance(schema, dict):
        return set()
    either = [schema.get(key) for key in ("anyOf", "oneOf")]
    types: set[str] = set()
    for one in [schema, *(part for parts in either if isinstance(parts, list) for part in parts)]:
        named = one.get("type") if isinstance(one, dict) else None
        types |= {
            name
            for name in JSON_TYPES
            if name == named or (isinstance(named, list) and name in named)
        }
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not types and isinstance(values, list):
        types |= {
            name for name, kinds in JSON_TYPES.items() for one in values if type(one) in kinds
        }
    return types


def _lenient(text: str) -> re.Pattern[str]:
    """Return a pattern of a text in which spaces may differ, as may numbers and ids."""
    parts = re.split(rf"(\s+|{'|'.join(IDS)}|\d+)", text.strip())
    patterns = [
        r"\s*"
        if not part.strip()
        else r"[\w.-]+"
        if part in IDS
        else r"\d+"
        if part.isdecimal()
        else re.escape(part)
        for part in parts
    ]
    return re.compile(r"\s*" + "".join(patterns) + r"\s*")


def _tight(text: str) -> str:
    """Return a pattern of a text in which the spaces at its ends may be missing, and no others added."""
    inner = text.strip()
    if not inner:
        return re.escape(text)
    start = text.find(inner)
    ends = (text[:start], text[start + len(inner) :])
    before, after = (f"(?:{re.escape(end)})?" if end else "" for end in ends)
    return before + re.escape(inner) + after
