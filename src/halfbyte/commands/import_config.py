"""Read a config of Axolotl, LLaMA-Factory, TRL or Unsloth, and write ours.

halfbyte import axolotl.yml --out configs/mine.yaml
halfbyte import sft_config.json --data rows.jsonl
Each key is taken, needs no twin, or is named with the reason in the first lines of what is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from halfbyte.errors import ConfigError

NO_ROWS = "rows.jsonl"  # where the other config names none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("file", type=Path, help="a YAML or JSON file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: it is printed")
    parser.add_argument("--from", dest="tool", choices=("axolotl", "llamafactory", "trl"))
    parser.add_argument("--data", metavar="ROWS", help="training rows, if the file names none")
    parser.add_argument("--json", action="store_true", help="print what each key became, as JSON")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Read, write, and say what each key became."""
    from halfbyte.config.read import check_values
    from halfbyte.importing.read import as_yaml, read_foreign

    if arguments.out and arguments.out.exists():
        raise ConfigError([f"{arguments.out} is there already; choose another --out"])
    tool, draft = read_foreign(arguments.file, arguments.tool)
    if arguments.data:
        draft.put("data.train", arguments.data)
    elif draft.get("data.train") is None:
        draft.put("data.train", NO_ROWS)
        draft.left["(no dataset)"] = ("", f"none is named: {NO_ROWS} stands for yours")
    if draft.get("model.name") is None:
        raise ConfigError([f"{arguments.file}: names no model; add model_name_or_path"])
    faults = check_values(draft.values, str(arguments.file))
    text = as_yaml(draft, tool, arguments.file.name)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    if arguments.json:
        left = {key: {"value": value, "why": why} for key, (value, why) in draft.left.items()}
        became = {"tool": tool, "config": draft.values, "taken": draft.taken, "left": left}
        print(json.dumps(became | {"faults": faults}, default=str))
        return
    if not arguments.out:
        print(text, end="")
    notes = sys.stderr
    print(f"{len(draft.taken)} keys taken, {len(draft.left)} without a twin", file=notes)
    for key, (_, why) in draft.left.items():
        print(f"  {key}: {why}", file=notes)
    for fault in faults:
        print(f"to mend: {fault}", file=notes)
    if arguments.out:
        print(f"next: halfbyte preview {arguments.out}", file=notes)
