"""Export a merged run for other engines, and prove that each artefact is the trained model.

halfbyte export runs/quickstart --to gguf --quant f16 q8_0 q4_k_m
halfbyte export runs/quickstart --to gguf --adapter-only
halfbyte export runs/quickstart --to awq
halfbyte export runs/quickstart --to adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config import Run, read_run_folder
from halfbyte.errors import UserError

if TYPE_CHECKING:
    from halfbyte.ship.measured_run import MeasuredRun
    from halfbyte.ship.proof import Exam


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("run", type=Path, help="a run folder, merged before")
    parser.add_argument("--to", choices=("gguf", "awq", "adapter"), required=True)
    parser.add_argument("--quant", nargs="+", metavar="TYPE", help="GGUF types; default: q8_0")
    parser.add_argument("--adapter-only", action="store_true", help="GGUF of the LoRA alone")
    parser.add_argument("--push", metavar="USER/NAME", help="afterwards, to the Hugging Face Hub")
    parser.add_argument("overrides", nargs="*", metavar="export.key=value")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run folder → export/NAME/ with the artefact and its proof, and a table of all of them."""
    if arguments.to != "gguf" and (arguments.quant or arguments.adapter_only):
        raise UserError(f"--quant and --adapter-only have no effect with --to {arguments.to}")
    if arguments.quant and arguments.adapter_only:
        raise UserError("--quant has no effect with --adapter-only, which is written in f32")
    given = arguments.quant or ["q8_0"]
    quants = [each for each in given if "=" not in each]
    if arguments.push and len(quants) > 1:
        raise UserError("--push takes one --quant at a time: a repository holds one artefact")
    overrides = [*arguments.overrides, *(each for each in given if "=" in each)]
    run = read_run_folder(arguments.run, overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.run_dir import RunDir
    from halfbyte.run_lock import only_writer
    from halfbyte.ship.export import ExportTarget, check_quants, export
    from halfbyte.ship.export_report import as_markdown
    from halfbyte.ship.hub import check_push, push

    check_quants(quants)
    if arguments.push:
        check_push(arguments.push)

    targets = [ExportTarget(arguments.to)]
    if arguments.to == "gguf":
        targets = [ExportTarget("gguf", quant) for quant in quants]
    if arguments.adapter_only:
        targets = [ExportTarget("gguf-lora")]
    folder = RunDir(arguments.run.resolve())
    with only_writer(folder.path):
        reports = export(folder.path, run, targets, lambda measured: _examine(measured, run))
    print(as_markdown(reports))
    for report in reports:
        print(f"proven: {folder.export / report.name}")
        if arguments.push:
            print(f"pushed: {push(folder, report, arguments.push)}")


def _examine(measured: MeasuredRun, run: Run) -> Exam | None:
    """The questions of the run's comparison, and how answers are graded."""
    from halfbyte.data.questions import held_out_rows, questions
    from halfbyte.eval.compare import check_answers
    from halfbyte.eval.measure import score_intervals
    from halfbyte.scoring.rows import answer_scores, parse_answers, with_tool_metrics
    from halfbyte.ship.proof import Exam

    if any(row.text is not None for row in measured.held_out):
        return None
    rows = held_out_rows(measured.trained.folder, run.eval.rows, run.seed)
    run, renderer = with_tool_metrics(run, rows), measured.trained.renderer
    check_answers(rows, run, renderer)

    def grade(answers: list[str]) -> dict[str, dict[str, float]]:
        parsed = parse_answers(answers, rows, renderer.answer_format)
        return score_intervals(answer_scores(parsed, rows, run), run)

    return Exam(questions(rows, renderer), grade, run.eval.max_new_tokens)
