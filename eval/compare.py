"""Compare a trained run with its full-size base on the same held-out rows, or finished runs with each other.

python eval/compare.py runs/quickstart [eval.rows=100 …]
python eval/compare.py runs/a runs/b …    (one that was not compared yet is; --out FOLDER keeps the table)
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config import read_run_folder
from halfbyte.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    from halfbyte.run_dir import RunDir


def main() -> None:
    """Run folder → report.json, report.md, report.html and a verdict; several → one table."""
    arguments = _arguments()
    if len(arguments.runs) > 1:
        _several(arguments)
        return
    (path,) = arguments.runs
    _one(path, arguments.overrides, workspace=arguments.workspace)


def _one(path: Path, overrides: list[str], *, workspace: bool = False) -> None:
    run = read_run_folder(path, overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.questions import held_out_rows
    from halfbyte.eval.benchmarks import load_benchmarks
    from halfbyte.eval.compare import compare
    from halfbyte.eval.dashboard import check_workspace, track_report
    from halfbyte.eval.pages import as_markdown
    from halfbyte.eval.report import write_report
    from halfbyte.run_dir import RunDir, read_jsonl
    from halfbyte.run_lock import only_writer

    folder = RunDir(path.resolve())
    if workspace:
        check_workspace(run)
    benchmarks = load_benchmarks(run)
    with only_writer(folder.path):
        trained, variants, notes = compare(folder.path, run, benchmarks)
        rows = held_out_rows(folder, run.eval.rows, run.seed)
        command = shlex.join(["python", "eval/compare.py", str(path), *overrides])
        report = write_report(trained, rows, variants, benchmarks, command=command, notes=notes)
        answered = list(read_jsonl(folder.eval / "answers.jsonl"))
        where = track_report(run, folder, report, answered, save_view=workspace)
    print(as_markdown(report))
    print(f"W&B: {where}\nread it: {folder.eval / 'report.html'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="+", metavar="RUN|eval.key=value")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the table of several runs")
    parser.add_argument("--workspace", action="store_true", help="save a view in W&B's project")
    arguments = parser.parse_intermixed_args()
    # Names of runs may have "=" in them too.
    is_run = {text: "=" not in text or Path(text).is_dir() for text in arguments.target}
    arguments.overrides = [text for text in arguments.target if not is_run[text]]
    arguments.runs = [Path(text) for text in arguments.target if is_run[text]]
    if not arguments.runs:
        parser.error("names no run folder")
    if arguments.out and len(arguments.runs) == 1:
        parser.error("--out is for several runs; one run's report goes to its folder")
    return arguments


def _several(arguments: argparse.Namespace) -> None:
    from halfbyte.eval.runs import as_markdown, compare_runs
    from halfbyte.run_dir import RunDir, write_json, write_text

    if arguments.overrides or arguments.workspace:
        raise ConfigError(
            ["several runs are compared as they were measured: no keys, no --workspace"]
        )
    folders = [RunDir(path.resolve()) for path in arguments.runs]
    for path, folder in zip(arguments.runs, folders, strict=True):
        if not (folder.eval / "report.json").is_file():
            _one(path, _unmerged(folder) if folder is folders[0] else _as_the_first(folders[0]))
    found = compare_runs(folders)
    print(as_markdown(found))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "runs.json", found)
        write_text(arguments.out / "runs.md", as_markdown(found))


def _as_the_first(first: RunDir) -> list[str]:
    """Return the settings that measure a run's adapter as those of the first run were."""
    from halfbyte.eval.report_record import Report

    settings = Report.read(first.eval / "report.json").eval
    alike = ("rows", "metrics", "max_new_tokens", "answer_pattern", "json_schema")
    keys = [f"eval.{key}={json.dumps(settings[key])}" for key in alike]
    keys += ["eval.baselines=[]", "eval.benchmarks=[]", "eval.judge=null"]
    return ["eval.variants=[adapter]", "eval.opponents=[]", *keys]


def _unmerged(folder: RunDir) -> list[str]:
    """Return the settings that leave the merged model out, if there is none."""
    variants = read_run_folder(folder.path).eval.variants
    if "merged" not in variants or folder.merged.is_dir():
        return []
    return [f"eval.variants={json.dumps([name for name in variants if name != 'merged'])}"]


if __name__ == "__main__":
    exit_on_user_error(main)
