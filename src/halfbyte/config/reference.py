"""Owns the key reference in docs/config.md: python -m halfbyte.config.reference > docs/config.md."""

from __future__ import annotations

import datetime
import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from halfbyte.config.schema import Run

INTRO = """# Config keys

Generated from the schema by `python -m halfbyte.config.reference > docs/config.md`; a test holds it true.

A config is a YAML 1.2 file. On the command line, `section.key=value` changes single keys and is read by the
same parser. Relative paths of the file are read from its folder, those on the command line from where you
are. Unknown, repeated, mistyped and contradictory keys, and options without effect, are errors with file and
line: all faults of names and types at once, or else all contradictions.
"""


def reference() -> str:
    """Return the whole reference as Markdown."""
    parts = [INTRO, "## Top level\n", _table(Run, sections=False)]
    for name, field in Run.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts += [
                f"## {name}\n",
                f"{inspect.getdoc(section)}\n",
                _table(section, sections=True),
            ]
            for key, listed in _listed_sections(section):
                parts += [f"### {name}.{key}[]\n", f"{inspect.getdoc(listed)}\n"]
                parts.append(_table(listed, sections=True))
    return "\n".join(parts)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a config file.

    It has the names, types and limits of all keys; contradictions between keys are found by ``halfbyte preview``.
    """
    schema = Run.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for key in section.get("properties", {}).values():
            key.pop("title", None)  # the key's own name in capitals
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **schema, "title": "halfbyte config"}


def _table(section: type[BaseModel], *, sections: bool) -> str:
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        kind = field.annotation
        if not sections and isinstance(kind, type) and issubclass(kind, BaseModel):
            continue
        limits = ", ".join(filter(None, map(_limit, [*field.metadata, *_inner_limits(kind)])))
        shown = _kind(kind) + (f", {limits}" if limits else "")
        cells = [f"`{name}`", shown, _default(field), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _listed_sections(section: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Return the sections that keys hold lists of, each with the first such key."""
    found: dict[type[BaseModel], str] = {}
    for name, field in section.model_fields.items():
        pending = [field.annotation]
        while pending:
            kind = pending.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found.setdefault(kind, name)
            pending += get_args(kind)
    return [(name, kind) for kind, name in found.items()]


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(
            _kind(inner) for inner in get_args(annotation) if inner is not type(None)
        )
    if origin is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    names = {
        bool: "`true`, `false`",
        int: "integer",
        float: "number",
        str: "text",
        datetime.date: "day",
    }
    return names.get(annotation, "mapping")


def _inner_limits(annotation: Any) -> list[Any]:
    """Return the limits inside a union, such as those of ``Positive | None``."""
    inner = [kind for kind in get_args(annotation) if get_origin(kind) is Annotated]
    return [
        item.metadata[0] if hasattr(item, "metadata") else item
        for kind in inner
        for item in get_args(kind)[1:]
    ]


def _limit(item: Any) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    limits = [(sign, getattr(item, name, None)) for name, sign in signs]
    return ", ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)


def _default(field: Any) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "**required**"
    value = field.default_factory() if field.default_factory else field.default
    if value is None:
        return "none"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`".replace("'", "")


if __name__ == "__main__":
    print(reference(), end="")
