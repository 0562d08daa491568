"""Owns the comparison: every variant on the same rows with the same renderer and greedy decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from halfbyte.config import Run
from halfbyte.data.questions import fewshot_examples, held_out_rows, questions
from halfbyte.data.rows import Row
from halfbyte.errors import RunError
from halfbyte.eval.harness import LoadedBenchmark, ask
from halfbyte.eval.measure import LOSS_METRIC, Variant, measure
from halfbyte.eval.metrics import scorer
from halfbyte.eval.variants import (
    ADAPTER,
    BASE_FULL,
    BASE_NF4,
    FEWSHOT,
    MERGED,
    Trained,
    contenders,
    is_artefact,
)
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.merged import MERGE_REPORT
from halfbyte.model.resolve import resolve_base
from halfbyte.run_dir import RunDir
from halfbyte.trained.artefact import read_artefact
from halfbyte.trained.run import same_compute, saved_renderer, trained_base

UNSCORABLE = {  # what is wrong with an answer that does not even match itself
    "exact_match": "matches eval.answer_pattern {0.answer_pattern!r} nowhere",
    "numeric_match": "holds no number",
    "field_match": "is no JSON object",
    "schema_valid": "does not keep to {0.json_schema}",
}


def compare(folder: RunDir, run: Run, benchmarks: Sequence[LoadedBenchmark] = ()) -> list[Variant]:
    """Measure every variant of ``eval.variants`` and ``eval.baselines``, in that order.

    Benchmarks are asked of every model but those in llama.cpp; of the base once, not again with examples.

    Raises:
        RunError: the run is not trained, or not merged while ``merged`` is asked for.
    """
    folder.trained()
    wanted = list(run.eval.variants)
    if MERGED in wanted:
        folder.need(
            folder.merged / MERGE_REPORT,
            f"python train/merge.py {folder.path} (or leave it out with eval.variants)",
        )
    for name in wanted:
        if is_artefact(name):
            read_artefact(folder, name)
    base = trained_base(folder, run)
    renderer = saved_renderer(folder, run, base)
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    check_answers(rows, run)
    asked = questions(rows, renderer)
    if FEWSHOT in wanted:
        fewshot_examples(folder, run.eval.fewshot, run.seed)
    for baseline in run.eval.baselines:
        resolve_base(baseline.model, baseline.revision)
        fewshot_examples(folder, baseline.fewshot, run.seed)
    trained = Trained(folder, run, base, same_compute(folder), asked, renderer)

    found = {}
    for contender in contenders(trained):
        found[contender.name] = variant = measure(contender, run)
        if contender.name != FEWSHOT and not isinstance(contender.model, GgufModel):
            for asked_of_all in benchmarks:
                task = asked_of_all.settings.task
                print(f"{contender.name}: {task}", file=sys.stderr, flush=True)
                variant.benchmarks[task] = ask(
                    asked_of_all, contender.model, contender.renderer.tokenizer, run
                )
        # The next model is loaded only when nothing holds this one any more.
        del contender
    order = [*wanted, *(baseline.name for baseline in run.eval.baselines)]
    return [found[name] for name in order]


def check_answers(rows: list[Row], run: Run) -> None:
    """Whether the metrics can score these rows, before any model is loaded.

    Raises:
        RunError: raw text is to be scored by its answers, or no answer could ever be right.
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
    for metric in metrics:
        score = scorer(metric, run.eval)
        for row in rows:
            if metric in UNSCORABLE and score(row.answer, row.answer) != 1:
                what = UNSCORABLE[metric].format(run.eval)
                raise RunError(
                    f"{row.place}: the wanted answer {row.answer[:60]!r} {what}, so that {metric} could"
                    " never count it as right; change eval.metrics or eval.answer_pattern"
                )
