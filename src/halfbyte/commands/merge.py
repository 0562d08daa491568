"""Fold a run's adapter into its base, and prove that the result is the trained model.

halfbyte merge runs/quickstart [merge.dtype=fp16 …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.config import read_run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("overrides", nargs="*", metavar="merge.key=value")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run folder → merged/ with safetensors, tokenizer, model card and merge_report.json."""
    run = read_run_folder(arguments.run, arguments.overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.run_dir import RunDir
    from halfbyte.run_lock import only_writer
    from halfbyte.ship.merge import merge

    folder = RunDir(arguments.run.resolve())
    with only_writer(folder.path):
        report = merge(folder.path, run)
    for candidate in report.candidates:
        print(
            f"{candidate.base} base in {candidate.dtype}:"
            f" KL {candidate.kl_nats_per_token:.2e} nats/token,"
            f" top-1 {candidate.top1_agreement:.2%}, loss {candidate.loss:.4f},"
            f" {candidate.weights_bytes / 1e6:.0f} MB"
        )
    print(f"trained model: loss {report.trained.loss:.4f}")
    print(f"kept the {report.kept.base} base: {folder.merged}")
    print(f"next: halfbyte compare {folder.path}")
