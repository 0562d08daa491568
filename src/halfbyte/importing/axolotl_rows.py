"""Owns the entries of ``datasets`` in Axolotl's YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from halfbyte.importing.draft import BadValueError, Covered, Draft, mapping, text, texts

FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
}
FIELDS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
LOADERS = ("json", "csv", "parquet", "arrow")  # of the datasets library, with data_files
OWN_TEMPLATE = "the chat template renders rows, not Alpaca's text"
BY_USUAL_NAMES = "roles and keys of turns are read by their usual names"
PREFERENCES = ("dpo", "ipo", "kto", "orpo", "chatml.intel", "chatml.ultra", "stepwise_supervised")
USUAL = {
    "ds_type": (*LOADERS,),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "message_property_mappings": (
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "roles": (
        {"user": ["human", "user"], "assistant": ["gpt", "assistant"]},
        {"user": ["user"], "assistant": ["assistant"]},
        {"user": ["human"], "assistant": ["gpt"]},
    ),
    "chat_template": ("tokenizer_default",),
    "trust_remote_code": (False,),
    "field_system": ("system",),
}


@dataclass
class _Entry:
    """An entry of ``datasets`` as it becomes a source of ours."""

    draft: Draft
    name: str
    source: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    messages: str = ""

    def sources(self) -> list[dict[str, Any]]:
        """Return our sources, one a file."""
        source = dict(self.source)
        if source.get("format") in ("messages", "sharegpt"):
            wanted = self.messages or (
                "messages" if source["format"] == "messages" else "conversations"
            )
            source["format"] = "sharegpt" if wanted == "conversations" else "messages"
            if wanted not in ("messages", "conversations"):
                self.columns["messages"] = wanted
        if self.columns:
            source["columns"] = self.columns
        if not self.files:
            return [source]
        if source.get("path") not in (None, *LOADERS):
            why = "name each file of a data set as an entry of data.train"
            self.draft.leave(f"{self.name}.data_files", self.files, why)
            return [source]
        return [{**source, "path": path} for path in self.files]


def read_datasets(path: str, pretrains: bool = False) -> Callable[[Draft, Any], None]:
    """Return the rule that takes ``datasets``, ``test_datasets`` or ``pretraining_dataset``."""

    def rule(draft: Draft, value: Any) -> None:
        entries = value if isinstance(value, list) else [value]
        taken: list[dict[str, Any]] = []
        for number, value_of_entry in enumerate(entries):
            if isinstance(value_of_entry, str):
                value_of_entry = {"path": value_of_entry}
            name = f"{path}[{number}]" if isinstance(value, list) else path
            entry = _Entry(draft, name)
            if pretrains:
                entry.source["format"] = "text"
            for key, setting in mapping(value_of_entry).items():
                _take(entry, key, setting)
            if not entry.source.get("path") and not entry.files:
                raise BadValueError("an entry without path")
            taken += entry.sources()
        _put(draft, "data.test" if path == "test_datasets" else "data.train", taken)

    return rule


def _put(draft: Draft, path: str, taken: list[dict[str, Any]]) -> None:
    """Set sources: one without settings of its own as a text, one for training by keys of the section."""
    only = taken[0]
    if len(taken) > 1 or (path == "data.test" and len(only) > 1):
        draft.put(path, taken)
        return
    draft.put(path, only["path"])
    for key, setting in only.items():
        if key != "path":
            draft.put(f"data.{'train_split' if key == 'split' else key}", setting)


def _take(entry: _Entry, key: str, value: Any) -> None:
    """Take one key of an entry, and record what it became."""
    draft, name = entry.draft, f"{entry.name}.{key}"
    if value is None or value in ("", [], {}):
        draft.taken[name] = "says nothing"
        return
    why = None
    try:
        if key == "type" and isinstance(value, dict):
            _custom(entry, value, name)
        else:
            why = _setting(entry, key, value)
    except BadValueError as error:
        draft.refuse(name, value, str(error))
        return
    if why is None or isinstance(why, Covered):
        draft.taken[name] = str(why or "taken")
    else:
        draft.leave(name, value, why)


def _setting(entry: _Entry, key: str, value: Any) -> str | None:
    if key in USUAL and value in USUAL[key]:
        return Covered("is the usual one")
    rule = SETTINGS.get(key)
    if rule is None:
        return BY_USUAL_NAMES if key in USUAL else "has no twin"
    return rule(entry, value)


def _split(entry: _Entry, value: Any) -> str | None:
    if set(text(value)) & {*"[+"}:
        return "a part of a split: data.train_frac, or rows of an entry of data.train"
    entry.source["split"] = text(value)
    return None


def _files(entry: _Entry, value: Any) -> None:
    entry.files = texts(value)


def _messages(entry: _Entry, value: Any) -> None:
    entry.messages = text(value)


def _to_source(ours: str) -> Callable[[_Entry, Any], None]:
    def rule(entry: _Entry, value: Any) -> None:
        entry.source[ours] = text(value)

    return rule


def _to_column(ours: str) -> Callable[[_Entry, Any], None]:
    def rule(entry: _Entry, value: Any) -> None:
        if text(value) != ours:
            entry.columns[ours] = text(value)

    return rule


def _format(entry: _Entry, value: str) -> str | None:
    kind = value.partition(".")[0].partition(":")[0]
    if value.startswith(PREFERENCES):
        raise BadValueError("preferences are not trained on; rows of answers are")
    if kind not in FORMATS:
        return f"formats: {', '.join(sorted(set(FORMATS.values())))}, with data.columns"
    entry.source["format"] = FORMATS[kind]
    if kind == "alpaca":
        entry.draft.note("text of Alpaca rows", OWN_TEMPLATE)
    elif value != kind:
        return f"{FORMATS[kind]} is read; what follows {kind} has no twin"
    return None


def _custom(entry: _Entry, value: dict[str, Any], name: str) -> None:
    """Take a type that names columns and a text of its own."""
    entry.source["format"] = "alpaca"
    for key, setting in value.items():
        draft, full = entry.draft, f"{name}.{key}"
        if setting is None or setting == "":
            draft.taken[full] = "says nothing"
        elif key in FIELDS:
            if text(setting) != FIELDS[key]:
                entry.columns[FIELDS[key]] = text(setting)
            draft.taken[full] = "taken"
        elif key == "field_system":
            entry.columns["system"] = text(setting)
            draft.taken[full] = "taken"
        elif key == "system_prompt":
            entry.source["system"] = text(setting)
            draft.taken[full] = "taken"
        else:
            draft.leave(full, setting, "rows are rendered by the chat template")


SETTINGS: dict[str, Callable[[_Entry, Any], str | None]] = {
    "path": _to_source("path"),
    "revision": _to_source("revision"),
    "name": _to_source("subset"),
    "split": _split,
    "type": lambda entry, value: _format(entry, text(value)),
    "data_files": _files,
    "field": _to_column("text"),
    "text_column": _to_column("text"),
    "field_messages": _messages,
    "conversation_field": _messages,
    "field_tools": _to_column("tools"),
    "field_system": _to_column("system"),
}
