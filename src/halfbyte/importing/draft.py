"""Owns the draft of a config: values that were taken from another tool's, and what each key became."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.bounds import shorten
from halfbyte.config.read import check_values
from halfbyte.config.schema import Run
from halfbyte.config.source import SECRET

SHOWN_CHARS = 120
SMALLEST = {  # a config that has what it must have, in which a value is checked
    "model": {"name": "model"},
    "data": {"train": "rows"},
    "train": {"learning_rate": 1e-4},
}


class BadValueError(Exception):
    """A value that stops the import; the text says what is expected."""


class Covered(str):
    """Why a key needs no twin."""

    __slots__ = ()


# Takes a value; returns why it has no twin, or why it needs none, else None.
Rule = Callable[["Draft", Any], str | None]
Rules = Mapping[str, Rule]


@dataclass
class Draft:
    """A config that grows from another tool's.

    Attributes:
        values: by section and key, as in a config.
        facts: what several keys decide together, such as the rows of a pass.
        taken: keys that became ours or need no twin, and what they became.
        left: keys without a twin, their values, and why; notes are in parentheses.
        faults: keys that stop the import, and why.
    """

    values: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    left: dict[str, tuple[Any, str]] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def put(self, path: str, value: Any) -> None:
        """Set the value at a dotted path.

        Raises:
            BadValueError: the schema does not allow it there.
        """
        values: dict[str, Any] = copy.deepcopy(SMALLEST)
        _set(values, path, value)
        try:
            Run.model_validate(values)
        except ValueError:
            fault = check_values(values, "")[0]
            detail = re.search(r"(?:should be|allowed: ).*", fault)
            raise BadValueError(f"{path}: {detail[0] if detail else fault}") from None
        _set(self.values, path, value)

    def get(self, path: str) -> Any:
        """Return the value at a dotted path, or None."""
        place: Any = self.values
        for part in path.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        return place

    def drop(self, path: str) -> None:
        """Take the value at a dotted path back, if there is one."""
        *sections, key = path.split(".")
        place = self.values
        for section in sections:
            place = place.get(section, {})
        place.pop(key, None)

    def default(self, path: str, value: Any) -> None:
        """Set the value at a dotted path where there is none."""
        if self.get(path) is None:
            self.put(path, value)

    def leave(self, name: str, value: Any, why: str) -> None:
        """Name a key without a twin; a secret is not shown."""
        self.taken.pop(name, None)
        self.left[name] = ("(a secret)" if SECRET.search(str(value)) else value, why)

    def note(self, about: str, why: str) -> None:
        """Name a difference that no key of the source tells."""
        self.left[f"({about})"] = ("", why)

    def refuse(self, name: str, value: Any, why: str) -> None:
        """Name a key that stops the import."""
        shown = "a secret" if SECRET.search(str(value)) else shorten(repr(value), SHOWN_CHARS)
        self.faults.append((name, f"{name} is {shown}: {why}"))

    def apply(self, source: Mapping[str, Any], rules: Rules, prefix: str = "") -> None:
        """Take each key of a source by its rule; a key without a rule, or that is refused, is left."""
        for key, value in source.items():
            self.take(f"{prefix}{key}", value, rules.get(key))

    def take(self, name: str, value: Any, rule: Rule | None) -> None:
        """Take one key by its rule."""
        if value is None or value in ("", [], {}):
            self.taken[name] = "says nothing"
            return
        before = repr(self.values), repr(self.facts)
        try:
            why = "has no twin" if rule is None else rule(self, value)
        except BadValueError as error:
            self.refuse(name, value, str(error))
            return
        if isinstance(why, Covered):
            self.taken[name] = str(why)
        elif why is not None:
            self.leave(name, value, why)
        else:
            changed = (repr(self.values), repr(self.facts)) != before
            self.taken[name] = "taken" if changed else "is so already"


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[key] = value


def whole(value: Any) -> int:
    """Return a whole number, which may be written as text."""
    plain = number(value)
    if plain != int(plain):
        raise BadValueError("a whole number is expected")
    return int(plain)


def count(value: Any) -> int:
    """Return a whole number of at least 1."""
    rows = whole(value)
    if rows < 1:
        raise BadValueError("at least 1 is expected")
    return rows


def number(value: Any) -> int | float:
    """Return a number, which may be written as text such as ``2e-4``."""
    try:
        if isinstance(value, bool):
            raise ValueError
        plain = value if isinstance(value, int) else float(value)
        if not abs(plain) < 1e300:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadValueError("a number is expected") from None
    return int(plain) if isinstance(plain, int) else plain


def text(value: Any) -> str:
    """Return a text, which may have been read as a number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadValueError("a text is expected")
    if not str(value).strip():
        raise BadValueError("it is blank")
    return str(value)


def texts(value: Any) -> list[str]:
    """Return a list of texts, which may be one text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in text(value).split(",") if part.strip()]
    if not isinstance(value, list):
        raise BadValueError("a list of texts is expected")
    return [text(part) for part in value]


def switch(value: Any) -> bool:
    """Return a truth value, which may be written as text."""
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    on = known.get(str(value).lower())
    if on is None:
        raise BadValueError("true or false is expected")
    return on


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping."""
    if not isinstance(value, dict):
        raise BadValueError("a mapping is expected")
    return value


def put(path: str, convert: Callable[[Any], Any]) -> Rule:
    """Return the rule that sets a converted value at a path."""

    def rule(draft: Draft, value: Any) -> str | None:
        draft.put(path, convert(value))
        return None

    return rule


def fact(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """Return the rule that keeps a converted value until all keys are read."""

    def rule(draft: Draft, value: Any) -> str | None:
        draft.facts[name] = convert(value)
        return None

    return rule


def one_of(path: str, ours: Mapping[str, str]) -> Rule:
    """Return the rule that sets our word for another; a word that has none is left."""

    def rule(draft: Draft, value: Any) -> str | None:
        word = ours.get(text(value))
        if word is None:
            return f"allowed for {path}: {', '.join(sorted(set(ours.values())))}"
        draft.put(path, word)
        return None

    return rule


def implied(why: str, unless: tuple[Any, ...] = ()) -> Rule:
    """Return the rule of a key that needs no twin, but for the values of ``unless``."""

    def rule(draft: Draft, value: Any) -> str | None:
        return why if value in unless else Covered(why)

    return rule


def lacking(why: str, unless: tuple[Any, ...] = (False,)) -> Rule:
    """Return the rule of a key that has no twin, but for values that ask for nothing."""

    def rule(draft: Draft, value: Any) -> str | None:
        return Covered("asks for nothing") if value in unless else why

    return rule


def refused(why: str, unless: tuple[Any, ...] = (False,)) -> Rule:
    """Return the rule of a key that asks for another kind of training, but for the values of ``unless``."""

    def rule(draft: Draft, value: Any) -> str | None:
        if value in unless:
            return Covered("asks for nothing else")
        raise BadValueError(why)

    return rule
