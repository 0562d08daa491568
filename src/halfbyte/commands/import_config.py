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
from typing import TYPE_CHECKING

from halfbyte.errors import ConfigError
from halfbyte.run_dir import write_text

if TYPE_CHECKING:
    from halfbyte.importing.draft import Draft

NO_ROWS = "rows.jsonl"  # where the other config names none
HUB_KEYS = ("train_split", "test_split", "subset", "revision", "field")


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
    _settle_rows(draft, arguments.data)
    if draft.get("model.name") is None:
        raise ConfigError([f"{arguments.file}: names no model; add model_name_or_path"])
    faults = check_values(draft.values, str(arguments.file))
    text = as_yaml(draft, tool, arguments.file.name)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out, text)
    if arguments.json:
        left = {key: {"value": value, "why": why} for key, (value, why) in draft.left.items()}
        became = {"tool": tool, "config": draft.values, "taken": draft.taken, "left": left}
        print(json.dumps(became | {"faults": faults}, default=str))
        return
    if not arguments.out:
        print(text, end="")
    _report(draft, faults, arguments.out)


def _settle_rows(draft: Draft, named: str | None) -> None:
    """Use the rows that the command line names, or say that none are known."""
    if named:
        draft.put("data.train", named)
        for key in HUB_KEYS:  # of the dataset that these rows replace
            draft.drop(f"data.{key}")
    elif draft.get("data.train") is None:
        draft.put("data.train", NO_ROWS)
        draft.left["(no dataset)"] = ("", f"none is named: {NO_ROWS} stands for yours")


def _report(draft: Draft, faults: list[str], out: Path | None) -> None:
    """Say beside the config what has no twin, and what is to be mended."""
    lines = [f"{len(draft.taken)} keys taken, {len(draft.left)} without a twin"]
    lines += [f"  {key}: {why}" for key, (_, why) in draft.left.items()]
    lines += [f"to mend: {fault}" for fault in faults]
    lines += [f"next: halfbyte preview {out}"] if out else []
    print("\n".join(lines), file=sys.stderr)
