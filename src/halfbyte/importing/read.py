"""Owns reading a file of another tool into a config of ours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from halfbyte.config.source import read_source
from halfbyte.errors import ConfigError
from halfbyte.importing import axolotl, llamafactory, trl
from halfbyte.importing.draft import Draft, finish

ORDER = ("name", "runs_dir", "seed", "model", "adapter", "data", "train", "eval", "track")
TOOLS = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL or Unsloth"}


def read_foreign(path: Path, tool: str | None = None) -> tuple[str, Draft]:
    """Read a config of Axolotl, LLaMA-Factory, TRL or Unsloth, in YAML or JSON.

    Args:
        path: the file.
        tool: ``axolotl``, ``llamafactory`` or ``trl``; None: it is told by its keys.

    Returns:
        The tool, and the draft with what each key became.

    Raises:
        ConfigError: the file cannot be read, or is of none of these tools.
    """
    source = read_source(path, [])
    if source.faults:
        raise ConfigError(source.faults)
    values = {str(key): value for key, value in source.values.items()}
    if tool is None:
        kinds = {
            "axolotl": axolotl.is_axolotl(values),
            "llamafactory": llamafactory.is_llamafactory(values),
            "trl": trl.is_trl(values),
        }
        tool = next((name for name, fits in kinds.items() if fits), None)
    if tool is None:
        raise ConfigError(
            [
                f"{path}: is of no known tool: Axolotl names base_model, LLaMA-Factory stage and finetuning_type, TRL"
                f" and Unsloth the arguments of SFTConfig and LoraConfig; found: {', '.join(list(values)[:8])}."
                f" --from {'|'.join(TOOLS)} says which it is"
            ]
        )
    if tool == "axolotl":
        draft = axolotl.read(values)
    elif tool == "llamafactory":
        draft = llamafactory.read(values, path.resolve().parent)
    else:
        draft = trl.read(values)
    finish(draft)
    return tool, draft


def as_yaml(draft: Draft, tool: str, source: str) -> str:
    """Return a draft as a config, with a comment for each key that has no twin."""
    known = {key: draft.values[key] for key in ORDER if key in draft.values}
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(known, stream)
    lines = [f"# Read from {source} of {TOOLS[tool]} by `halfbyte import`."]
    if draft.left:
        lines.append("# Keys without a twin, which this config leaves out:")
        lines += [
            f"#   {key}: {_short(value)}    ({why})" for key, (value, why) in draft.left.items()
        ]
    return "\n".join([*lines, "", stream.getvalue()])


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
