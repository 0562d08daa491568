"""Compare one model at every precision: bytes, perplexity, KL to the full precision, score and speed.

halfbyte ladder configs/quickstart.yaml [section.key=value …] [--rungs fp32 bf16 int8 nf4 nf4+dq fp4]
halfbyte ladder runs/quickstart    (the merged model and what `halfbyte export` made of it)
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from halfbyte.config import load_run, read_run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("target", type=Path, help="a .yaml config or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rungs", nargs="+", metavar="NAME", help="the first is the reference")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/eval or ./ladder")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measure the ladder of a config or run folder; write ladder.json and ladder.md."""
    # Overrides that follow --rungs are read as its values.
    values = arguments.rungs or []
    arguments.overrides += [text for text in values if "=" in text]
    arguments.rungs = [text for text in values if "=" not in text]
    is_config = arguments.target.suffix in (".yaml", ".yml")
    read = load_run if is_config else read_run_folder
    run = read(arguments.target, arguments.overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.eval.ladder import (
        DEFAULT_RUNGS,
        as_markdown,
        ladder_of_config,
        ladder_of_run,
        measure_ladder,
        qlora_lines,
    )
    from halfbyte.model.precision import device_name
    from halfbyte.run_dir import RunDir, provenance, write_json, write_text

    if is_config:
        ladder, folder = ladder_of_config(run), Path("ladder")
    else:
        ladder = ladder_of_run(arguments.target, run)
        folder = RunDir(arguments.target.resolve()).eval
    measured = measure_ladder(ladder, arguments.rungs or DEFAULT_RUNGS)
    rungs = [rung.as_json(run) for rung in measured]
    folder = arguments.out or folder
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["halfbyte", "ladder", *arguments.words]),
        "device": device_name(),
        "model": ladder.base.name,
        "rungs": rungs,
        **provenance(),
    }
    write_json(folder / "ladder.json", report)
    metric = ladder.run.eval.metrics[0]
    text = "\n".join(
        [
            f"# {ladder.base.name}\n",
            f"{len(ladder.questions)} rows; {ladder.base.origin}.\n",
            as_markdown(rungs, metric),
            *(f"- {line}" for line in qlora_lines(rungs)),
            "",
        ]
    )
    write_text(folder / "ladder.md", text)
    print(text)
