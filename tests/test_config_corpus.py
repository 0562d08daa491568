"""A bad config of each kind for every key of the schema: each is refused by the key's name and its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import load_run
from halfbyte.config.read import keys_of
from halfbyte.errors import ConfigError

SECTIONS = [section for section in keys_of(()) if keys_of((section,))]
KEYS = [(section, key) for section in SECTIONS for key in keys_of((section,))]
BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "org/model"},
    "data": {"train": "org/rows", "test": "org/held-out"},
    "train": {"learning_rate": 1e-4},
}


def test_there_are_many_keys() -> None:
    assert len(KEYS) >= 70


def configs(kind: str) -> Iterator[tuple[str, str, int, str]]:
    """Key, text of a config that is wrong in it, the line of the fault, and what the message must have."""
    for section, key in KEYS:
        others = {name: value for name, value in BASE.get(section, {}).items() if name != key}
        lines = [f"{name}: {json.dumps(value)}" for name, value in BASE.items() if name != section]
        lines += [f"{section}:", *(f"  {name}: {value}" for name, value in others.items())]
        name = f"{section}.{key}"
        if kind == "a mapping for a value":
            lines.append(f"  {key}: {{strange: 1}}")
            yield name, "\n".join(lines), len(lines), name
        elif kind == "misspelt":
            wrong = f"{key[:-1]}{key[-1] * 2}z"
            known = BASE.get(section, {}).get(key)
            lines += [f"  {key}: {known}"] if known else []
            lines.append(f"  {wrong}: 1")
            yield name, "\n".join(lines), len(lines), f"unknown key {section}.{wrong}; "
        else:
            lines += [f"  {key}: 1", f"  {key}: 1"]
            yield name, "\n".join(lines), len(lines), key


@pytest.mark.parametrize("kind", ["a mapping for a value", "misspelt", "twice"])
def test_every_key_is_named_when_it_is_wrong(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.yaml"
    for key, text, line, wanted in configs(kind):
        path.write_text(text + "\n", encoding="utf-8")
        with pytest.raises(ConfigError) as refused:
            load_run(path, [], {})
        faults = [fault for fault in refused.value.faults if wanted in fault]
        assert faults, (key, refused.value.faults)
        assert any(f"{path}:{line}" in fault for fault in faults), (key, faults)


def test_every_key_is_named_when_an_override_of_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(json.dumps(BASE), encoding="utf-8")
    load_run(path, [], {})
    for section, key in KEYS:
        with pytest.raises(ConfigError) as refused:
            load_run(path, [f"{section}.{key}={{strange: 1}}"], {})
        assert any(f"{section}.{key}" in fault for fault in refused.value.faults), (section, key)
