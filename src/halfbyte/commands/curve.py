"""How many rows does it take: train on growing shares of the rows, and compare each with the cheap opponents.

halfbyte curve configs/my.yaml [section.key=value …] [--fractions 0.125 0.25 0.5 1]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from halfbyte.config import load_run
from halfbyte.errors import ConfigError

OPPONENTS = "[majority, nearest, linear, copy]"  # those without a model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.125, 0.25, 0.5, 1.0])


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Config → a run for each share in NAME-r0.125 … → curve.json, curve.md and a picture in the last report."""
    fractions = sorted(set(arguments.fractions))
    if len(fractions) < 2 or not all(0 < fraction <= 1 for fraction in fractions):
        raise ConfigError(
            [
                f"--fractions {fractions}: a curve has two shares of the rows or more, above 0 and up to 1"
            ]
        )
    run = load_run(arguments.config, arguments.overrides)
    if run.eval.metrics[0] == "held_out_loss":
        raise ConfigError(["eval.metrics: a curve needs a metric that scores each answer first"])
    paths = []
    for fraction in fractions:
        path = Path(run.runs_dir) / f"{run.name}-r{fraction:g}"
        keys = [*arguments.overrides, f"name={path.name}", f"data.train_frac={fraction:g}"]
        _run("train", arguments.config, *keys)
        if not (path / "eval" / "report.json").is_file():
            _run("compare", path, "eval.variants=[adapter]", f"eval.opponents={OPPONENTS}")
        paths.append(path)

    from halfbyte.eval.curve import as_markdown, read_curve
    from halfbyte.eval.report import write_curve
    from halfbyte.run_dir import RunDir
    from halfbyte.trained.run import read_trained_run

    curve = read_curve([RunDir(path.resolve()) for path in paths])
    write_curve(read_trained_run(paths[-1]), curve)
    print(as_markdown(curve))
    print(f"read it: {paths[-1] / 'eval' / 'report.html'}")


def _run(command: str, *arguments: object) -> None:
    """Run a command in a process of its own, and stop where it fails."""
    words = [sys.executable, "-m", "halfbyte", command, *map(str, arguments)]
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(done.returncode)
