"""Owns reading a file of another tool into a config of ours."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from halfbyte.bounds import shorten
from halfbyte.config.source import Source, read_source
from halfbyte.errors import ConfigError
from halfbyte.importing import axolotl, llamafactory, trl
from halfbyte.importing.draft import Draft
from halfbyte.importing.settle import settle

ORDER = ("name", "runs_dir", "seed", "model", "adapter", "data", "train", "eval", "track")
TOOLS = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL or Unsloth"}
SHOWN_CHARS = 60


def read_foreign(path: Path, tool: str | None = None) -> tuple[str, Draft]:
    """Read a config of Axolotl, LLaMA-Factory, TRL or Unsloth, in YAML or JSON.

    Args:
        path: the file.
        tool: ``axolotl``, ``llamafactory`` or ``trl``; None: it is told by its keys.

    Returns:
        The tool, and the draft with what each key became.

    Raises:
        ConfigError: the file cannot be read, is of none of these tools, has a value of a wrong type or out of
            range, or asks for another kind of training.
    """
    source = read_source(path, [])
    if source.faults:
        raise ConfigError(source.faults)
    values = source.values
    tool = tool or _tool_of(values)
    if tool is None:
        keys = shorten(", ".join(list(values)[:8]), 200)
        raise ConfigError(
            [
                f"{path}: is of no known tool: Axolotl names base_model, LLaMA-Factory stage and finetuning_type, TRL"
                f" and Unsloth the arguments of SFTConfig and LoraConfig; found: {keys}."
                f" --from {'|'.join(TOOLS)} says which it is"
            ]
        )
    if tool == "axolotl":
        draft, defaults = axolotl.read(values)
    elif tool == "llamafactory":
        draft, defaults = llamafactory.read(values, path.resolve().parent)
    else:
        draft, defaults = trl.read(values)
    if not draft.faults:
        settle(draft, defaults)
    if draft.faults:
        raise ConfigError([f"{_place(source, name)}: {fault}" for name, fault in draft.faults])
    return tool, draft


def _tool_of(values: dict[str, Any]) -> str | None:
    kinds = {
        "axolotl": axolotl.is_axolotl(values),
        "llamafactory": llamafactory.is_llamafactory(values),
        "trl": trl.is_trl(values),
    }
    return next((name for name, fits in kinds.items() if fits), None)


def _place(source: Source, name: str) -> str:
    """Return where a key such as ``datasets[0].type`` was written."""
    parts = re.findall(r"[^.\[\]]+", name)
    return source.place(tuple(int(part) if part.isdecimal() else part for part in parts))


def as_yaml(draft: Draft, tool: str, source: str) -> str:
    """Return a draft as a config, with a comment for each key that has no twin."""
    known = {key: draft.values[key] for key in ORDER if key in draft.values}
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.allow_unicode = False
    yaml.width = 4096
    yaml.dump(known, stream)
    lines = [f"# Read from {_one_line(source)} of {TOOLS[tool]} by `halfbyte import`."]
    if draft.left:
        lines.append("# Keys without a twin, which this config leaves out:")
        lines += [
            f"#   {_one_line(key)}: {_one_line(value)}    ({why})"
            for key, (value, why) in draft.left.items()
        ]
    return "\n".join([*lines, "", stream.getvalue()])


def _one_line(value: Any) -> str:
    plain = "".join(char if char.isprintable() else " " for char in str(value))
    return shorten(" ".join(plain.split()), SHOWN_CHARS)
