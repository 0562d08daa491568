"""Owns LLaMA-Factory's dataset_info.json, which says what its names of data sets stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.bounds import BoundError, read_text
from halfbyte.importing.draft import BadValueError, Draft, mapping, text, whole

INFO = "dataset_info.json"
MAX_INFO_BYTES = 4 << 20
COLUMNS = {  # of dataset_info.json, and ours
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "messages": "messages",
    "tools": "tools",
}
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system",),
}


def put_rows(draft: Draft, folder: Path) -> None:
    """Set the sources of a draft by the names of data sets that it has read."""
    try:
        place, known = _dataset_info(folder, draft.facts.get("dataset_dir", "data"))
    except BadValueError as error:
        draft.refuse("dataset_dir", draft.facts.get("dataset_dir", "data"), str(error))
        return
    for key, path in (("datasets", "data.train"), ("eval_datasets", "data.test")):
        try:
            _put_sources(draft, path, draft.facts.get(key) or [], place, known)
        except BadValueError as error:
            draft.refuse("dataset", draft.facts[key], str(error))


def _dataset_info(folder: Path, named: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the folder of the data sets, and what is known of them; None for names on the Hub."""
    if named == "ONLINE":
        return folder, None
    for base in (folder, Path.cwd(), *folder.parents):
        path = base / named / INFO
        if not path.is_file():
            continue
        try:
            return path.parent, mapping(json.loads(read_text(path, MAX_INFO_BYTES)))
        except (BoundError, OSError, ValueError, RecursionError) as error:
            raise BadValueError(f"{path} cannot be read: {error}") from error
    return folder, {}


def _put_sources(
    draft: Draft, path: str, names: list[str], folder: Path, known: dict[str, Any] | None
) -> None:
    sources = [_source(draft, name, folder, known) for name in names]
    limit = draft.facts.get("max_rows")
    for source in sources:
        if limit and path == "data.train":
            source["rows"] = min(whole(limit), source.get("rows", whole(limit)))
        if draft.facts.get("stage") == "pt":
            _as_text(source)
    if not sources:
        return
    simple = len(sources) == 1 and set(sources[0]) == {"path"}
    draft.put(path, sources[0]["path"] if simple else sources)


def _as_text(source: dict[str, Any]) -> None:
    """Make a source one of raw text, which LLaMA-Factory reads from the column of the prompt."""
    column = source.pop("columns", {}).get("instruction", "text")
    source["format"] = "text"
    if column != "text":
        source["columns"] = {"text": column}


def _source(draft: Draft, name: str, folder: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Return our source of a data set by its name in dataset_info.json."""
    if known is None:
        return {"path": name}
    if name not in known:
        why = f"{INFO} with it was not found; say in data.train where its rows are"
        draft.leave(f"dataset {name}", name, why)
        return {"path": f"{name}.json"}
    entry = mapping(known[name])
    source: dict[str, Any] = {"path": _path(draft, name, entry, folder)}
    for key, ours in (("subset", "subset"), ("split", "split"), ("revision", "revision")):
        if entry.get(key):
            source[ours] = text(entry[key])
    if entry.get("num_samples"):
        source["rows"] = whole(entry["num_samples"])
    is_chat = entry.get("formatting", "alpaca") in ("sharegpt", "openai")
    columns = _columns(draft, name, mapping(entry.get("columns") or {}), is_chat)
    source["format"] = _format(is_chat, columns)
    if columns:
        source["columns"] = columns
    _refuse_rankings(entry, name)
    for key, tag in mapping(entry.get("tags") or {}).items():
        if tag not in TAGS.get(key, ()):
            why = "roles and keys of turns are read by their usual names"
            draft.leave(f"dataset {name}.tags.{key}", tag, why)
    return source


def _format(is_chat: bool, columns: dict[str, str]) -> str:
    """Return the format of the rows; a column of turns that has its usual name is no longer renamed."""
    if not is_chat:
        return "alpaca"
    turns = columns.get("messages", "conversations")
    if turns in ("messages", "conversations"):
        columns.pop("messages", None)
    return "sharegpt" if turns == "conversations" else "messages"


def _refuse_rankings(entry: dict[str, Any], name: str) -> None:
    if entry.get("ranking"):
        raise BadValueError(f"{name} has rankings, and preferences are not trained on")


def _path(draft: Draft, name: str, entry: dict[str, Any], folder: Path) -> str:
    for key in ("folder", "ms_hub_url", "script_url", "cloud_file_name"):
        if entry.get(key):
            why = "rows are read from a file, a folder or the Hub"
            draft.leave(f"dataset {name}.{key}", entry[key], why)
    if entry.get("hf_hub_url"):
        return text(entry["hf_hub_url"])
    if entry.get("file_name"):
        return str(folder / text(entry["file_name"]))
    return f"{name}.json"


def _columns(draft: Draft, name: str, columns: dict[str, Any], is_chat: bool) -> dict[str, str]:
    """Return our names of columns, without those that are called so already."""
    renamed = {}
    for key, column in columns.items():
        ours = COLUMNS.get(key)
        if column is None:
            continue
        if ours is None:
            why = (
                "turns of before are read from messages"
                if key == "history"
                else "only text is trained on"
            )
            draft.leave(f"dataset {name}.columns.{key}", column, why)
        elif text(column) != ours or (ours == "messages" and is_chat):
            renamed[ours] = text(column)
    return renamed
