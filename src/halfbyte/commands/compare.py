"""Compare a trained run with its full-size base on the same held-out rows, or finished runs with each other.

halfbyte compare runs/quickstart [eval.rows=100 …]
halfbyte compare runs/quickstart --require "exact_match>=0.4" --require "gain>=0"    (for CI: exit code 0, 3 or 4)
halfbyte compare runs/a runs/b …    (one that was not compared yet is; --out FOLDER keeps the table)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config import read_run_folder
from halfbyte.config.section import OPPONENTS
from halfbyte.errors import ConfigError
from halfbyte.run_dir import RunDir, read_jsonl, write_json, write_text
from halfbyte.run_lock import only_writer

if TYPE_CHECKING:
    from halfbyte.eval.gate import Requirement
    from halfbyte.eval.report_record import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("target", nargs="+", metavar="RUN|eval.key=value")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the table of several runs")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="FIGURE>=NUMBER",
        help="[VARIANT.]METRIC, gain[.VARIANT] or forgetting[.TASK], >= or <=, decided on its interval: the"
        " exit code is 3 if one is missed, 4 if the rows are too few to tell",
    )
    parser.add_argument(
        "--junit", type=Path, metavar="FILE", help="of --require; default: RUN/eval/junit.xml"
    )
    parser.add_argument("--json", action="store_true", help="print report.json, and nothing else")
    parser.add_argument("--workspace", action="store_true", help="save a view in W&B's project")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run folder → report.json, report.md, report.html and a verdict; several → one table."""
    # Names of runs may have "=" in them too.
    is_run = {text: "=" not in text or Path(text).is_dir() for text in arguments.target}
    arguments.overrides = [text for text in arguments.target if not is_run[text]]
    arguments.runs = [Path(text) for text in arguments.target if is_run[text]]
    if not arguments.runs:
        parser.error("names no run folder")
    if arguments.out and len(arguments.runs) == 1:
        parser.error("--out is for several runs; one run's report goes to its folder")
    if arguments.junit and not arguments.require:
        parser.error("--junit is for --require")
    if len(arguments.runs) > 1:
        if arguments.require:
            parser.error("--require is for one run")
        _several(arguments)
        return
    (path,) = arguments.runs
    # Libraries print at import.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        from halfbyte.eval.gate import EXIT_CODES, as_junit, decide, read_requirements, worst
        from halfbyte.eval.pages import as_markdown

        requirements = read_requirements(arguments.require)
        report, where = _one(path, arguments.overrides, requirements, arguments.workspace)
    decisions = decide(report, requirements)
    if arguments.json:
        required = [decision.as_json() for decision in decisions]
        print(json.dumps(report.as_json() | ({"required": required} if required else {})))
    else:
        print(as_markdown(report))
        print(f"W&B: {where}\nread it: {path / 'eval' / 'report.html'}")
        print("\n".join(decision.as_text() for decision in decisions), end="\n" * bool(decisions))
    if decisions:
        write_text(arguments.junit or path / "eval" / "junit.xml", as_junit(report.run, decisions))
        raise SystemExit(EXIT_CODES[worst(decisions)])


def _one(
    path: Path,
    overrides: list[str],
    requirements: Sequence[Requirement] = (),
    workspace: bool = False,
) -> tuple[Report, str]:
    """Compare one run; return its report, and where W&B has it."""
    from halfbyte.eval.gate import check_requirements

    run = read_run_folder(path, overrides)
    variants = [*run.eval.variants, *(baseline.name for baseline in run.eval.baselines), *OPPONENTS]
    tasks = [benchmark.task for benchmark in run.eval.benchmarks]
    check_requirements(requirements, run.eval.metrics, variants, tasks)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.questions import held_out_rows
    from halfbyte.eval.benchmarks import load_benchmarks
    from halfbyte.eval.compare import compare
    from halfbyte.eval.dashboard import check_workspace, track_report
    from halfbyte.eval.report import write_report

    folder = RunDir(path.resolve())
    if workspace:
        check_workspace(run)
    benchmarks = load_benchmarks(run)
    with only_writer(folder.path):
        trained, measured, notes = compare(folder.path, run, benchmarks)
        rows = held_out_rows(folder, run.eval.rows, run.seed)
        command = shlex.join(["halfbyte", "compare", str(path), *overrides])
        report = write_report(trained, rows, measured, benchmarks, command=command, notes=notes)
        answered = list(read_jsonl(folder.eval / "answers.jsonl"))
        where = track_report(run, folder, report, answered, save_view=workspace)
    return report, where


def _several(arguments: argparse.Namespace) -> None:
    from halfbyte.eval.runs import as_markdown, compare_runs

    if arguments.overrides or arguments.workspace:
        raise ConfigError(
            ["several runs are compared as they were measured: no keys, no --workspace"]
        )
    folders = [RunDir(path.resolve()) for path in arguments.runs]
    for path, folder in zip(arguments.runs, folders, strict=True):
        if not (folder.eval / "report.json").is_file():
            print(f"{path} was not compared yet", file=sys.stderr)
            _one(path, _unmerged(folder) if folder is folders[0] else _as_the_first(folders[0]))
    found = compare_runs(folders)
    print(json.dumps(found) if arguments.json else as_markdown(found))
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
