"""Owns the account of a row's keys: each is used, refused by name, or counted as ignored."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.bounds import shorten
from halfbyte.errors import DataError

MAX_ERROR_CHARS = 300  # of the message about one row
MAX_VALUE_CHARS = 60  # of a value in it
SURROGATES = re.compile("[\ud800-\udfff]")
# Spellings of "no value" that data sets use as text: Alpaca's seed tasks write the first.
BLANK_WORDS = frozenset(["<noinput>", "<no input>"])
# With the repair blank_system, these words are blank too.
NOTHING_WORDS = frozenset(["none", "null", "nan", "n/a", "nil"])

NO_MEDIA = "only text is trained on; remove it, or these rows"
LEARN_BY_WEIGHT = "say what is learnt by a weight of 0 or 1 on each assistant turn"
IN_TURN = "write it into the assistant's turn that it belongs to"
GOOD_ANSWERS = (
    "it says which answers are good, as in KTO: keep the rows that are true, and remove the column"
)
PREFERENCE = (
    "preferences are not trained on; name the answer to learn with data.columns, as {prompt: prompt,"
    " completion: chosen}"
)
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios")
# Keys that would change what is learnt, but mean nothing here: a row that has them is refused.
REFUSED_IN_TURN = {
    **dict.fromkeys(("mask", "masked", "loss_mask", "train_detail"), LEARN_BY_WEIGHT),
    "tools": "name them in a column of the row",
    "functions": "name them as tools in a column of the row",
    "refusal": "write a refusal as content",
    **dict.fromkeys(MEDIA, NO_MEDIA),
}
REFUSED_IN_ROW = {
    **dict.fromkeys(("train", "loss", "mask", "masked", "loss_mask", "labels"), LEARN_BY_WEIGHT),
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), IN_TURN),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        f"{IN_TURN}, or name it with data.columns as reasoning_content beside a completion or output",
    ),
    "functions": "name it as tools with data.columns",
    "history": "write the earlier turns as messages",
    **dict.fromkeys(("chosen", "rejected"), PREFERENCE),
    **dict.fromkeys(MEDIA, NO_MEDIA),
}


@dataclass
class Account:
    """What happened to keys and turns of rows as they were read.

    Attributes:
        repairs: names of the repairs to apply.
        ignored: keys that are not used, with how often they occur.
        repaired: names of repairs, with how many rows they changed.
    """

    repairs: Sequence[str] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)

    def says_nothing(self, text: Any) -> bool:
        """Return whether an optional text is none, however that is written; count the repair of words."""
        if is_blank(text):
            return True
        if "blank_system" not in self.repairs or not isinstance(text, str):
            return False
        is_word = is_nothing_word(text)
        self.repaired["blank_system"] += is_word
        return is_word


class RowError(DataError):
    """A row that cannot be used.

    Attributes:
        place: where the row comes from.
        reason: kind of the fault, without values of the row; the ledger counts by it.
    """

    def __init__(self, place: str, reason: str, detail: str) -> None:
        self.place, self.reason = place, reason
        super().__init__(shorten(f"{place}: {detail}", MAX_ERROR_CHARS))


def quoted(value: Any) -> str:
    """Return a value for an error: null, or its type and the beginning of its JSON."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return shorten(repr(value[: MAX_VALUE_CHARS + 1]), MAX_VALUE_CHARS)
    return (
        f"{type(value).__name__} {shorten(json.dumps(value, default=str)[:200], MAX_VALUE_CHARS)}"
    )


def has_value(value: Any) -> bool:
    """Return whether a field holds something: not null, NaN, blank text or an empty list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return not isinstance(value, list | dict) or bool(value)


def is_blank(text: Any) -> bool:
    """Return whether an optional text is no text, however that is written."""
    return not has_value(text) or (isinstance(text, str) and text.strip().lower() in BLANK_WORDS)


def is_nothing_word(text: str) -> bool:
    """Return whether a text is a word that says nothing where the repair of such words is asked for."""
    return text.strip().lower() in NOTHING_WORDS


class Fields:
    """The keys of a row or of a turn, each to be taken before ``finish`` accounts for the rest.

    Args:
        place: where the row comes from.
        where: name of the row's part in errors and counts, such as ``messages.``; "" for the row.
        values: key to value; keys without a value count as absent.
    """

    def __init__(self, place: str, where: str, values: dict[str, Any]) -> None:
        self.place, self.where = place, where
        self.values = {key: value for key, value in values.items() if has_value(value)}

    def take(self, *keys: str) -> Any:
        """Return the value of the one key that is present, or None.

        Raises:
            RowError: several are present with different values.
        """
        present = {key: self.values.pop(key) for key in keys if key in self.values}
        values = list(present.values())
        if any(value != values[0] for value in values[1:]):
            names = " and ".join(present)
            raise self.error("two values for one field", f"has different {names}; keep one of them")
        return values[0] if values else None

    def error(self, reason: str, detail: str) -> RowError:
        """Return an error about this part of the row."""
        part = self.where.rstrip(".")
        return RowError(self.place, reason, f"{part} {detail}" if part else detail)

    def refuse(self, refused: dict[str, str]) -> None:
        """Refuse the row if a key that was not taken would change what is learnt.

        Raises:
            RowError: one does.
        """
        for key, value in self.values.items():
            # Other labels are classes, which tell nothing of what is to be learnt.
            is_verdict = key == "label" and str(value).strip().lower() in ("true", "false")
            remedy = GOOD_ANSWERS if is_verdict else refused.get(key)
            if remedy:
                raise self.error(
                    f"{key!r} is not supported", f"has {key!r}: {quoted(value)}; {remedy}"
                )

    def finish(self, refused: dict[str, str], account: Account) -> None:
        """Account for the keys that were not taken: count them, or refuse the row.

        Raises:
            RowError: one of them would change what is learnt.
        """
        self.refuse(refused)
        for key in self.values:
            name = f"{_kind(self.where)}{key}"
            account.ignored[name.encode("utf-8", "backslashreplace").decode()] += 1


class RepeatedKeyError(ValueError):
    """A key that stands twice in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {shorten(repr(twice), MAX_VALUE_CHARS)} stands twice")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_unique)  # raises where a value would vanish


def json_value(place: str, name: str, value: Any) -> Any:
    """Return a value that may be the JSON text of itself, as in a cell of a CSV file.

    Raises:
        RowError: it is text, but not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return JSON.decode(value)
    except (ValueError, RecursionError) as error:
        hint = (
            "; it reads like Python's repr: write it with json.dumps"
            if value.lstrip()[:2] in ("[{", "{'", "['") and "'" in value
            else ""
        )
        raise RowError(
            place,
            f"{name} is not JSON",
            f"{name} is {quoted(value)}, which is not JSON: {error}{hint}",
        ) from None


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode: it holds no half of a surrogate pair."""
    return text.isascii() or not SURROGATES.search(text)


def valid_text(place: str, column: str, value: Any) -> str:
    """Return ``value`` if it is text that can be trained on.

    Raises:
        RowError: it is not a string, is blank, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise RowError(
            place, f"{_kind(column)} is not text", f"{column} is {quoted(value)}; text is expected"
        )
    if not value.strip():
        raise RowError(place, f"{_kind(column)} is blank", f"{column} is blank; text is expected")
    if not is_unicode(value):
        raise RowError(
            place,
            "invalid Unicode",
            f"{column} holds half a surrogate pair, which is not valid Unicode text",
        )
    return value


def _kind(column: str) -> str:
    """Return a column's name without the number of the turn."""
    return re.sub(r"\[\d+\]", "", column)
