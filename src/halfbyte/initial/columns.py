"""Owns which columns of a table hold prompts and answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halfbyte.data.fields import has_value
from halfbyte.data.rows import FORMATS
from halfbyte.errors import DataError

PROMPTS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "input",
    "text",
    "source",
    "src",
    "utterance",
    "sentence",
    "document",
    "article",
    "problem",
    "dialogue",
    "context",
)
ANSWERS = (
    "completion",
    "output",
    "response",
    "answer",
    "best_answer",
    "answers",
    "target",
    "tgt",
    "label_text",
    "label",
    "category",
    "intent",
    "class",
    "summary",
    "highlights",
    "canonical_solution",
    "solution",
    "sql",
    "translation",
    "reply",
)
CONTEXTS = ("input", "context", "passage", "document", "schema")
TEXTS = ("text", "value", "content")  # what an object that is an answer names its text
ORDER = ("messages", "sharegpt", "prompt_completion", "alpaca", "multiple_choice", "text")
SAMPLE_ROWS = 50  # whose columns are looked at
MAX_DEPTH = 4


def choose_columns(
    rows: list[dict[str, Any]], prompt: str | None = None, answer: str | None = None
) -> tuple[str, dict[str, str]]:
    """Return the format of rows, and the columns whose names differ from the format's.

    Args:
        rows: as stored.
        prompt: the column of the prompts, if the user named it.
        answer: that of the answers, likewise.

    Raises:
        DataError: no column is known to hold the answers, or the prompts.
    """
    columns = list(dict.fromkeys(column for row in rows[:1000] for column in row))
    if prompt is None and answer is None:
        if {"chosen", "rejected"} <= set(columns):
            question = _first(columns, ("prompt", "conversations", "question", "instruction"))
            return "prompt_completion", {"prompt": question, "completion": "chosen"}
        for name in ORDER:
            # A text beside a label is a prompt.
            labelled = name == "text" and any(_key(column) in ANSWERS for column in columns)
            if set(FORMATS[name][0]) <= set(columns) and not labelled:
                return name, {}
    paths = list(dict.fromkeys(path for row in rows[:SAMPLE_ROWS] for path in _paths(row)))
    answer = answer or _best(paths, ANSWERS) or _right_choice(rows)
    left = [path for path in paths if path != answer]
    prompt = prompt or _best(left, PROMPTS)
    if answer is None or prompt is None:
        lacking = "answers" if answer is None else "prompts"
        raise DataError(
            f"found the columns {', '.join(paths[:20])}; none is known to hold {lacking}. Name both with --prompt"
            " COLUMN --answer COLUMN; dots lead into nested ones, as in answers.text.0"
        )
    context = next((p for p in left if p != prompt and _key(p) in CONTEXTS), None)
    if context is not None and _key(prompt) in ("instruction", "question", "query", "prompt"):
        named = {"instruction": prompt, "input": context, "output": answer}
        return "alpaca", {name: path for name, path in named.items() if name != path}
    named = {"prompt": prompt, "completion": answer}
    return "prompt_completion", {name: path for name, path in named.items() if name != path}


def _right_choice(rows: list[dict[str, Any]]) -> str | None:
    """Return the path of the right choice where it is always the first: ``{choices: […], labels: [1, 0, …]}``."""
    for column, value in rows[0].items() if rows else ():
        if isinstance(value, dict) and {"choices", "labels"} <= set(value):
            labels = [row[column]["labels"] for row in rows]
            if all(list(each)[:1] == [1] and sum(each) == 1 for each in labels):
                return f"{column}.choices.0"
    return None


def _first(columns: list[str], names: tuple[str, ...]) -> str:
    name = next((each for each in names if each in columns), None)
    if name is None:
        raise DataError(f"found the columns {', '.join(columns)}; none is known to hold prompts")
    return name


def _best(paths: list[str], names: tuple[str, ...]) -> str | None:
    """Return the path whose last name, or else its first, comes first in ``names``; of equal ones, the least nested."""
    ranked = []
    for path in paths:
        for key in (_key(path), _key(path.partition(".")[0])):
            if key in names:
                is_plain = _key(path) in (key, *TEXTS)
                ranked.append((names.index(key), not is_plain, path.count("."), path))
                break
    return min(ranked)[3] if ranked else None


def _key(path: str) -> str:
    """Return the last name of a path, in small letters: ``best_answer`` of ``Best Answer``."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    return parts[-1].strip().lower().replace(" ", "_").replace("-", "_")


def _paths(value: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the paths of texts and numbers in a row; of a list, its first entry stands for all."""
    if isinstance(value, dict) and depth < MAX_DEPTH:
        for key, inner in value.items():
            if "." not in str(key):
                yield from _paths(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(value, list) and value and depth < MAX_DEPTH:
        yield from _paths(value[0], f"{prefix}.0", depth + 1)
    elif prefix and has_value(value) and not isinstance(value, bool):
        yield prefix
