"""Owns the comparison of finished runs on the rows that all of them answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.config import Run, read_run_folder
from halfbyte.config.evaluation import Eval
from halfbyte.errors import RunError
from halfbyte.eval.intervals import evidence, judge_together, mean_interval, paired_difference
from halfbyte.eval.pages import interval, signed
from halfbyte.eval.report_record import Report
from halfbyte.eval.seeds import over_seeds, seed_lines
from halfbyte.eval.variants import is_trained, trained_name
from halfbyte.run_dir import RunDir, read_jsonl
from halfbyte.scoring.rows import LOSS_METRIC
from halfbyte.trained.manifest import finished_manifest

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
SEEDS = {"seed", "train.seed"}  # keys in which trainings of the same settings differ
# Sections and keys that change nothing in the weights, and those of eval that change scores.
UNTRAINED = ("eval.", "merge.", "export.", "track.", "train.existing", "train.ignore_plan")
SCORING = ("max_new_tokens", "answer_pattern", "json_schema", "metrics")
UNCOMPARED = ("runs_dir", "name")  # config keys that say where a run is, not how it trained


@dataclass(frozen=True)
class Compared:
    """A run that was compared with its base.

    Attributes:
        folder: the run's folder.
        run: its config, as it was compared.
        report: the content of its report.json.
        variant: the entry of its trained variant.
        by_variant: the scores of each variant by conversation.
    """

    folder: RunDir
    run: Run
    report: Report
    variant: dict[str, Any]
    by_variant: dict[str, dict[str, float]]

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the trained variant by conversation."""
        return self.by_variant.get(self.variant["name"], {})


def compare_runs(folders: Sequence[RunDir]) -> dict[str, Any]:
    """Compare each run with the first on their common rows, corrected for the number of runs (Holm).

    Raises:
        RunError: a run is not compared yet, the metrics differ, or the runs have no rows in common.
    """
    first, *others = runs = [_read(folder) for folder in folders]
    metric = first.report.metric
    odd = [one for one in runs if one.report.metric != metric]
    if odd or metric == LOSS_METRIC:
        what = f"{odd[0].report.metric} ({odd[0].folder.path})" if odd else LOSS_METRIC
        raise RunError(
            f"runs can only be compared by one metric that scores each answer, not by {metric}"
            f" ({first.folder.path}) and {what}. Compare each run again with the same eval.metrics"
        )
    versions = {one.report.metrics_version for one in runs}
    if len(versions) > 1:
        raise RunError(
            f"{', '.join(str(one.folder.path) for one in runs)}: scored by different versions of the metrics"
            f" ({', '.join(map(str, sorted(versions)))}), so that scores cannot be compared. Compare each run again:"
            " halfbyte compare RUN"
        )
    common = [row for row in first.scores if all(row in other.scores for other in others)]
    if not common:
        raise RunError(
            f"{', '.join(str(one.folder.path) for one in runs)}: no row was answered by all runs; their rows"
            " were held out from different data or drawn with different seeds"
        )
    chosen = first.run.eval
    level = (chosen.confidence, chosen.resamples, first.run.seed)
    first_scores = [first.scores[row] for row in common]
    differences = []
    for other in others:
        scores = [other.scores[row] for row in common]
        difference = paired_difference(scores, first_scores, *level)
        differences.append({**difference.as_json(), **evidence(scores, first_scores, *level)})
    judged = judge_together(differences, chosen.confidence, BETTER, WORSE, NOT_SHOWN)
    entries = []
    setups = {entry["task"]: _setup(entry) for entry in first.report.benchmarks}
    for one in runs:
        estimate = mean_interval([one.scores[row] for row in common], *level)
        entries.append({**_entry(one, setups), metric: estimate.as_json()})
    for entry, against_first in zip(entries[1:], judged, strict=True):
        entry["against_first"] = against_first
    settings = _differing(runs)
    is_one_setup = _differ_in_the_seed(runs, settings)
    return {
        "metric": metric,
        "n": len(common),
        "runs": entries,
        "settings": settings,
        "seeds": _over_seeds(runs, common) if is_one_setup else {},
    }


def _read(folder: RunDir) -> Compared:
    """Read the report and the answers of a run."""
    command = f"halfbyte compare {folder.path}"
    report = Report.read(folder.need(folder.eval / "report.json", command))
    entries = {entry["name"]: entry for entry in report.variants}
    ours = trained_name(entries)
    if ours is None:
        raise RunError(f"{folder.path}: was compared without its trained variant. Run: {command}")
    scores = variant_scores(folder, report.metric)
    # With the settings of the comparison, which may differ from those of the training.
    run = read_run_folder(folder.path)
    run = run.model_copy(update={"eval": Eval.model_validate(report.eval)})
    return Compared(folder, run, report, entries[ours], scores)


def _differ_in_the_seed(runs: Sequence[Compared], settings: dict[str, list[Any]]) -> bool:
    """Return whether runs are trainings of the same settings with different seeds, scored alike."""
    trained = {key for key in settings if not key.startswith(UNTRAINED)}
    scored = {f"eval.{key}" for key in SCORING} & settings.keys()
    seeds = {one.run.training_seed for one in runs}
    variants = {one.variant["name"] for one in runs}
    return trained <= SEEDS and not scored and len(seeds) == len(runs) > 1 == len(variants)


def _over_seeds(runs: Sequence[Compared], rows: Sequence[str]) -> dict[str, Any]:
    """Compare trainings of the same settings with what the first run was compared with, on common rows."""
    first = runs[0]
    ours = np.array([[one.scores[row] for row in rows] for one in runs])
    others = {
        name: np.array([by_row[row] for row in rows])
        for name, by_row in first.by_variant.items()
        if not is_trained(name)
    }
    return over_seeds(ours, others, first.run.eval.confidence)


def variant_scores(folder: RunDir, metric: str) -> dict[str, dict[str, float]]:
    """Return the scores of a compared run's answers by a metric, by variant and conversation."""
    scores: dict[str, dict[str, float]] = {}
    path = folder.need(folder.eval / "answers.jsonl", f"halfbyte compare {folder.path}")
    for row in read_jsonl(path):
        for name, by_metric in row["scores"].items():
            if metric in by_metric:
                scores.setdefault(name, {})[row["id"]] = float(by_metric[metric])
    return scores


def _setup(benchmark: dict[str, Any]) -> str:
    """Return what must be equal to compare two results of a benchmark: questions, settings, metric."""
    keys = ("tasks", "metric", "max_new_tokens", "chat_template")
    return json.dumps({key: benchmark[key] for key in keys}, sort_keys=True)


def _entry(one: Compared, setups: dict[str, str]) -> dict[str, Any]:
    """Return a run's figures, with those benchmarks that ran as they did in the first run."""
    manifest = finished_manifest(one.folder)
    return {
        "run": one.report.run,
        "folder": str(one.folder.path),
        "variant": one.variant["name"],
        "held_out_loss": one.variant["held_out_loss"],
        "weights_bytes": one.variant["weights_bytes"],
        "training_seconds": manifest.training_seconds,
        "benchmarks": {
            benchmark["task"]: benchmark["variants"][one.variant["name"]]["value"]
            for benchmark in one.report.benchmarks
            if one.variant["name"] in benchmark["variants"]
            and _setup(benchmark) == setups.get(benchmark["task"])
        },
    }


def _differing(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """Return the config keys that are not the same in all runs, with each run's value."""
    flat = [_flat(one.run.model_dump(mode="json")) for one in runs]
    keys = sorted({key for values in flat for key in values})
    by_key = {key: [values.get(key) for values in flat] for key in keys if key not in UNCOMPARED}
    return {key: values for key, values in by_key.items() if any(v != values[0] for v in values)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_markdown(comparison: dict[str, Any]) -> str:
    """Format the comparison as a page of Markdown."""
    metric, runs = comparison["metric"], comparison["runs"]
    tasks = list(dict.fromkeys(task for run in runs for task in run["benchmarks"]))
    head = ["run", metric, f"difference to {runs[0]['run']}", "held-out loss", "weights"]
    head += ["training time"]
    lines = [
        f"{comparison['n']} rows, answered by all runs. A positive difference is an improvement.",
        "",
    ]
    lines += ["| " + " | ".join([*head, *tasks]) + " |", "|" + " --- |" * (len(head) + len(tasks))]
    for run in runs:
        difference = run.get("against_first")
        seconds = run["training_seconds"]
        cells = [
            run["run"],
            interval(run[metric]),
            f"{signed(difference)}: {difference['verdict']}" if difference else "",
            f"{run['held_out_loss']:.3f}",
            f"{run['weights_bytes'] / 1e6:.0f} MB",
            "" if seconds is None else f"{seconds:.0f} s",
        ]
        cells += [f"{run['benchmarks'][t]:.3f}" if t in run["benchmarks"] else "" for t in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    if comparison["settings"]:
        lines += ["", "| setting | " + " | ".join(run["run"] for run in runs) + " |"]
        lines.append("|" + " --- |" * (len(runs) + 1))
        for key, values in comparison["settings"].items():
            lines.append(f"| `{key}` | " + " | ".join(str(value) for value in values) + " |")
    return "\n".join([*lines, *seed_lines(comparison), ""])
