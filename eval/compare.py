"""Compare a trained run with its full-size base on the same held-out rows.

python eval/compare.py runs/quickstart [eval.rows=100 …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.config import read_run_folder
from halfbyte.errors import exit_on_user_error


def main() -> None:
    """Run folder → report.json, report.md, report.html and a verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("overrides", nargs="*", metavar="eval.key=value")
    arguments = parser.parse_args()
    run = read_run_folder(arguments.run, arguments.overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.questions import held_out_rows
    from halfbyte.eval.compare import compare
    from halfbyte.eval.harness import load_benchmarks
    from halfbyte.eval.report import as_markdown, write_report
    from halfbyte.run_dir import RunDir

    folder = RunDir(arguments.run.resolve())
    benchmarks = load_benchmarks(run)
    variants = compare(folder, run, benchmarks)
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    report = write_report(folder, run, rows, variants, benchmarks)
    print(as_markdown(report))
    print(f"read it: {folder.eval / 'report.html'}")


if __name__ == "__main__":
    exit_on_user_error(main)
