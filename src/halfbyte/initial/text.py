"""Owns the config that init writes: YAML with a comment for each value that the rows or the machine decided."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

SECTIONS = ("name", "runs_dir", "seed", "model", "adapter", "data", "train", "eval", "merge")


def config_text(
    settings: dict[str, Any], comments: dict[str, str], head: list[str], schema: str
) -> str:
    """Return a config.

    Args:
        settings: key → value.
        comments: key → what is said behind it.
        head: lines of comment above all.
        schema: file of the JSON Schema, by which editors complete and check.
    """
    top = CommentedMap()
    order = sorted(settings, key=lambda key: SECTIONS.index(key.partition(".")[0]))
    for key in order:
        section, _, name = key.rpartition(".")
        place = top.setdefault(section, CommentedMap()) if section else top
        place[name] = _flow(settings[key])
        if key in comments:
            place.yaml_add_eol_comment(f"# {comments[key]}", name, 0)
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 1000
    yaml.dump(top, stream)
    lines = [f"# yaml-language-server: $schema={schema}", *(f"# {line}" for line in head)]
    return "\n".join([*lines, "", _spaced(stream.getvalue())])


def _flow(value: Any) -> Any:
    """Return a list as one that is written on one line, and so a mapping of names."""
    if isinstance(value, list):
        row = CommentedSeq(value)
        row.fa.set_flow_style()
        return row
    if isinstance(value, dict):
        mapping = CommentedMap(value)
        mapping.fa.set_flow_style()
        return mapping
    return value


def _spaced(text: str) -> str:
    """Put an empty line before each section."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.rstrip().endswith(":") and not line.startswith(" ") and lines:
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def path_from(folder: Path, path: Path) -> str:
    """Return a path as a config in ``folder`` names it: relative if they are near, else absolute."""
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive
        return str(path)
    return str(path) if relative.count("..") > 2 else Path(relative).as_posix()
