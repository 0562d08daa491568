"""Owns the comparison of finished runs: what each was measured at, on the rows that all of them answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.config import Run, read_run_folder
from halfbyte.config.evaluation import Eval
from halfbyte.errors import RunError
from halfbyte.eval.intervals import evidence, judge_together, mean_interval, paired_difference
from halfbyte.eval.measure import LOSS_METRIC
from halfbyte.eval.pages import interval, signed
from halfbyte.eval.variants import trained_name
from halfbyte.run_dir import RunDir, read_json, read_jsonl

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
UNCOMPARED = ("runs_dir", "name")


@dataclass(frozen=True)
class Compared:
    """A run that was compared with its base.

    Attributes:
        variant: its trained variant.
        scores: of that variant, by conversation.
    """

    folder: RunDir
    run: Run
    report: dict[str, Any]
    variant: dict[str, Any]
    scores: dict[str, float]


def compare_runs(folders: Sequence[RunDir]) -> dict[str, Any]:
    """Each run against the first, on common rows, corrected for their number (Holm).

    Raises:
        RunError: a run is not compared yet, metrics differ, or they have no rows in common.
    """
    first, *others = runs = [_read(folder) for folder in folders]
    metric = first.report["metric"]
    odd = [one for one in runs if one.report["metric"] != metric]
    if odd or metric == LOSS_METRIC:
        what = f"{odd[0].report['metric']} ({odd[0].folder.path})" if odd else LOSS_METRIC
        raise RunError(
            f"runs are compared by one metric that scores each answer: {metric} ({first.folder.path}),"
            f" {what}. Compare each anew with the same eval.metrics"
        )
    common = [row for row in first.scores if all(row in other.scores for other in others)]
    if not common:
        raise RunError(
            f"{', '.join(str(one.folder.path) for one in runs)}: no row was asked of all of them; they were"
            " held out from other data, or drawn with another seed"
        )
    settings = first.run.eval
    level = (settings.confidence, settings.resamples, first.run.seed)
    own = [first.scores[row] for row in common]
    found = []
    for other in others:
        theirs = [other.scores[row] for row in common]
        difference = paired_difference(theirs, own, *level)
        found.append({**difference.as_json(), **evidence(theirs, own, *level)})
    judged = judge_together(found, settings.confidence, BETTER, WORSE, NOT_SHOWN)
    entries = []
    asked = {told["task"]: _asked(told) for told in first.report.get("benchmarks", [])}
    for one in runs:
        scores = mean_interval([one.scores[row] for row in common], *level)
        entries.append({**_entry(one, asked), metric: scores.as_json()})
    for entry, difference_told in zip(entries[1:], judged, strict=True):
        entry["against_first"] = difference_told
    return {"metric": metric, "n": len(common), "runs": entries, "settings": _differing(runs)}


def _read(folder: RunDir) -> Compared:
    command = f"python eval/compare.py {folder.path}"
    report = read_json(folder.need(folder.eval / "report.json", command))
    entries = {entry["name"]: entry for entry in report["variants"]}
    ours = trained_name(entries)
    if ours is None:
        raise RunError(f"{folder.path}: was compared without its adapter. Run: {command}")
    entry = entries[ours]
    scores = {}
    for row in read_jsonl(folder.need(folder.eval / "answers.jsonl", command)):
        told = row["scores"][entry["name"]]
        if report["metric"] in told:
            scores[row["id"]] = float(told[report["metric"]])
    # As it was compared, which may be otherwise than it was configured.
    run = read_run_folder(folder.path)
    run = run.model_copy(update={"eval": Eval.model_validate(report["eval"])})
    return Compared(folder, run, report, entry, scores)


def _asked(told: dict[str, Any]) -> str:
    """What makes two results of a benchmark comparable: its questions, settings and metric."""
    kept = ("tasks", "metric", "max_new_tokens", "chat_template")
    return json.dumps({key: told[key] for key in kept}, sort_keys=True)


def _entry(one: Compared, same: dict[str, str]) -> dict[str, Any]:
    """A run's figures; of benchmarks those that were asked as in the first run."""
    manifest = read_json(one.folder.manifest)
    return {
        "run": one.report["run"],
        "folder": str(one.folder.path),
        "variant": one.variant["name"],
        "held_out_loss": one.variant["held_out_loss"],
        "weights_bytes": one.variant["weights_bytes"],
        "training_seconds": manifest.get("training_seconds"),
        "benchmarks": {
            told["task"]: told["variants"][one.variant["name"]]["value"]
            for told in one.report.get("benchmarks", [])
            if one.variant["name"] in told["variants"] and _asked(told) == same.get(told["task"])
        },
    }


def _differing(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """Config keys that are not the same in all runs, with each run's value."""
    flat = [_flat(one.run.model_dump(mode="json")) for one in runs]
    keys = sorted({key for values in flat for key in values})
    told = {key: [values.get(key) for values in flat] for key in keys if key not in UNCOMPARED}
    return {key: values for key, values in told.items() if any(v != values[0] for v in values)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def as_markdown(found: dict[str, Any]) -> str:
    """The comparison as a page."""
    metric, runs = found["metric"], found["runs"]
    tasks = list(dict.fromkeys(task for run in runs for task in run["benchmarks"]))
    head = ["run", metric, f"against {runs[0]['run']}", "held-out loss", "weights", "training"]
    lines = [f"{found['n']} rows that all runs answered.", ""]
    lines += ["| " + " | ".join([*head, *tasks]) + " |", "|" + " --- |" * (len(head) + len(tasks))]
    for run in runs:
        told = run.get("against_first")
        seconds = run["training_seconds"]
        cells = [
            run["run"],
            interval(run[metric]),
            f"{signed(told)}: {told['verdict']}" if told else "",
            f"{run['held_out_loss']:.3f}",
            f"{run['weights_bytes'] / 1e6:.0f} MB",
            "" if seconds is None else f"{seconds:.0f} s",
        ]
        cells += [f"{run['benchmarks'][t]:.3f}" if t in run["benchmarks"] else "" for t in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    if found["settings"]:
        lines += ["", "| key | " + " | ".join(run["run"] for run in runs) + " |"]
        lines.append("|" + " --- |" * (len(runs) + 1))
        for key, values in found["settings"].items():
            lines.append(f"| `{key}` | " + " | ".join(str(value) for value in values) + " |")
    return "\n".join([*lines, ""])
