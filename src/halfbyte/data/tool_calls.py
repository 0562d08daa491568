"""Owns tools in rows: the list of tools that may be called, and the calls, however a data set writes them."""

from __future__ import annotations

import json
from typing import Any

from halfbyte.data.conversation import ToolCall
from halfbyte.data.fields import Account, Fields, RowError, json_value, quoted, valid_text

IN_FUNCTION = "write it into the function alone"


def parse_calls(place: str, where: str, value: Any, account: Account) -> tuple[ToolCall, ...]:
    """Parse tool calls: a call or a list of calls, as objects or as their JSON text.

    A call is ``{id, type, function: {name, arguments}}`` or ``{name, arguments}``, its arguments an object
    or the JSON text of one. Other keys of a call are counted as ignored.

    Raises:
        RowError: a call has another shape, or says something twice.
    """
    if value is None:
        return ()
    value = json_value(place, where, value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        written = call if isinstance(call, dict) else {}
        function = written.get("function", written)
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if (
            not isinstance(name, str)
            or not name.strip()
            or written.get("type", "function") not in ("function", None)
        ):
            raise RowError(
                place,
                "a tool call without a name",
                f"{where} has {quoted(call)}; a call is"
                " {id, type: function, function: {name, arguments}} or {name, arguments}",
            )
        outer = Fields(place, f"{where}.", written)
        inner = outer
        if outer.take("function") is not None:
            inner = Fields(place, f"{where}.function.", function)
        identity = outer.take("id")
        for key in ("type", "index"):
            outer.take(key)
        inner.take("name")
        arguments = inner.take("arguments", "parameters")
        if arguments is None:
            arguments = {}
        inner.finish({}, account)
        outer.finish(dict.fromkeys(("name", "arguments", "parameters"), IN_FUNCTION), account)
        arguments = json_value(place, f"{where} arguments", arguments)
        if not isinstance(arguments, dict):
            raise RowError(
                place,
                "arguments of a tool call",
                f"{where} has arguments {quoted(arguments)};"
                " an object, or the JSON text of one, is expected",
            )
        calls.append(
            ToolCall(
                valid_text(place, f"{where}.name", name),
                _json_text(place, where, arguments),
                None if identity is None else valid_text(place, f"{where}.id", str(identity)),
            )
        )
    return tuple(calls)


def parse_tools(place: str, value: Any) -> str:
    """Return the JSON text of the list of tools that a column holds; "" if it holds none.

    A tool is ``{type: function, function: {name, description, parameters}}``; a function alone is wrapped.

    Raises:
        RowError: it is no list of tools.
    """
    value = json_value(place, "tools", value)
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = json_value(place, "tools", tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                place,
                "a tool without a name",
                f"tools has {quoted(tool)}; a tool is {{type:"
                " function, function: {name, description, parameters}}, the parameters a JSON schema",
            )
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return _json_text(place, "tools", tools) if tools else ""


def _json_text(place: str, where: str, value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return valid_text(place, where, text)
