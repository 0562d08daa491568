"""Owns the comparison of all variants on the same rows with the same renderer and greedy decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halfbyte.config import Run
from halfbyte.data.conversation import Row
from halfbyte.data.ledger import Ledger
from halfbyte.data.questions import fewshot_examples, held_out_rows, questions, training_rows
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.eval.base_opponents import BaseOpponent, base_opponents, context_of
from halfbyte.eval.benchmarks import LoadedBenchmark, ask
from halfbyte.eval.likeness import Examples, Likeness
from halfbyte.eval.measure import Variant, measure
from halfbyte.eval.opponents import opponents
from halfbyte.eval.variants import (
    ADAPTER,
    BASE_FULL,
    BASE_NF4,
    FEWSHOT,
    MERGED,
    Comparison,
    asks_base,
    base_side,
    contenders,
    is_artefact,
)
from halfbyte.generate.grammar import GrammarError
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.merged import MERGE_REPORT, merge_command, merged_report
from halfbyte.model.resolve import resolve_base
from halfbyte.scoring.rows import LOSS_METRIC, parse_answers, row_scorers, with_tool_metrics
from halfbyte.trained.artefact import read_artefact
from halfbyte.trained.run import TrainedRun, read_trained_run

UNSCORABLE = {  # why an answer does not even match itself
    "exact_match": "matches eval.answer_pattern {0.answer_pattern!r} nowhere",
    "numeric_match": "holds no number",
    "field_match": "is no JSON object",
    "schema_valid": "does not keep to {0.json_schema}",
    "tool_match": "has calls that cannot be read back as the chat template writes them",
    "tool_valid": "has calls that do not keep to the tools of its row",
}


def compare(
    path: Path, run: Run, benchmarks: Sequence[LoadedBenchmark] = ()
) -> tuple[TrainedRun, list[Variant], list[str]]:
    """Measure every variant of ``eval.variants`` and ``eval.baselines``, and the opponents, in that order.

    Every model except those in llama.cpp runs the benchmarks; the base runs them only once.

    Args:
        path: the run folder.
        run: its settings, with overrides of ``eval``.
        benchmarks: the loaded general benchmarks.

    Returns:
        The run, the results of each variant, and notes for the report.

    Raises:
        RunError: the run is not trained, is not merged although ``merged`` is a variant, or a file differs
            from the one that was measured.
    """
    trained, rows = _checked(path, run)
    run = trained.run
    plain = questions(rows, trained.renderer)
    comparison = Comparison(trained, trained.trained_compute(), plain)
    counted: list[Variant] = []
    notes: list[str] = []
    if run.eval.allowed_opponents and run.eval.metrics[0] != LOSS_METRIC:
        comparison, counted, notes = _with_opponents(comparison, rows)

    variants = {}
    for contender in contenders(comparison):
        try:
            variants[contender.name] = variant = measure(contender, run)
        except GrammarError as error:
            notes.append(f"{contender.name} was left out: {error}")
            continue
        is_plain = contender.name != FEWSHOT and contender.opponent is None
        if is_plain and not isinstance(contender.model, GgufModel):
            for benchmark in benchmarks:
                task = benchmark.settings.task
                print(f"{contender.name}: {task}", file=sys.stderr, flush=True)
                variant.benchmarks[task] = ask(
                    benchmark, contender.model, contender.renderer.tokenizer, run
                )
        # Drop the reference before the next model is loaded.
        del contender
    order = [*run.eval.variants, *(baseline.name for baseline in run.eval.baselines)]
    order += [one.name for one in comparison.opponents if one.name in variants]
    return trained, [*(variants[name] for name in order), *counted], notes


def _checked(path: Path, run: Run) -> tuple[TrainedRun, list[Row]]:
    """Return a run with the settings of its comparison, and its rows, once all that is compared is there."""
    trained = read_trained_run(path, run)
    folder, wanted = trained.folder, run.eval.variants
    if MERGED in wanted:
        advice = f"{merge_command(folder)} (or leave it out with eval.variants)"
        folder.need(folder.merged / MERGE_REPORT, advice)
        merged_report(folder)
    for name in wanted:
        if is_artefact(name):
            read_artefact(folder, name)
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    run = with_tool_metrics(run, rows)
    check_answers(rows, run, trained.renderer)
    if FEWSHOT in wanted:
        fewshot_examples(folder, run.eval.fewshot, run.seed)
    for baseline in run.eval.baselines:
        resolve_base(baseline.model, baseline.revision)
        fewshot_examples(folder, baseline.fewshot, run.seed)
    return replace(trained, run=run), rows


def _with_opponents(
    comparison: Comparison, rows: list[Row]
) -> tuple[Comparison, list[Variant], list[str]]:
    """Return the comparison with its opponents that ask the base, those without a model, and notes."""
    trained, run = comparison.trained, comparison.run
    known = [row for row in training_rows(trained.folder) if row.text is None]
    if not known:
        return comparison, [], ["No opponents: the run kept no training rows with answers."]
    notes = []
    num_trained = Ledger.read(trained.folder.ledger).trained
    if len(known) < num_trained:
        notes.append(f"The opponents know {len(known):,} of {num_trained:,} training rows.")
    renderer = trained.renderer
    likeness = Likeness(Examples.of(known, renderer), Examples.of(rows, renderer))
    counted, left_out = opponents(likeness, renderer, run)
    notes += left_out
    with_base: list[BaseOpponent] = []
    if asks_base(run):
        base, base_renderer, plain = base_side(comparison)
        context = context_of(base)
        with_base, left_out = base_opponents(likeness, plain, base_renderer, run, context)
        for one in with_base:
            print(f"{one.name}: about {one.num_tokens:,} tokens", file=sys.stderr)
        notes += left_out
    return replace(comparison, opponents=tuple(with_base)), counted, notes


def check_answers(rows: list[Row], run: Run, renderer: Renderer) -> None:
    """Check that the metrics can score these rows, before any model is loaded.

    Raises:
        RunError: a metric needs answers but the rows are raw text, or no answer could ever be correct.
        UserError: a metric needs a library that is not installed.
    """
    metrics = [metric for metric in run.eval.metrics if metric != LOSS_METRIC]
    if any(row.text is not None for row in rows):
        if metrics or FEWSHOT in run.eval.variants:
            raise RunError(
                "the run's rows are raw text, which has no answers to score: use"
                f" eval.metrics=[{LOSS_METRIC}] and leave {FEWSHOT} out of eval.variants, such as"
                f" eval.variants=[{BASE_FULL},{BASE_NF4},{ADAPTER},{MERGED}]"
            )
        return
    scorers = row_scorers(run)  # before any of them is used, so that none lacks a library
    checked = [metric for metric in metrics if metric in UNSCORABLE]
    texts = [renderer.wanted_text(row) for row in rows] if checked else []
    wanted = parse_answers(texts, rows, renderer.answer_format) if checked else []
    for metric in checked:
        for row, answer in zip(rows, wanted, strict=True):
            if scorers[metric](answer, row) != 1:
                what = UNSCORABLE[metric].format(run.eval)
                raise RunError(
                    f"{row.place}: the wanted answer {row.answer[:60]!r} {what}, so that {metric} could"
                    " never count it as right; change eval.metrics or eval.answer_pattern"
                )
