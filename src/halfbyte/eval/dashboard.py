"""Owns recording a comparison in Weights & Biases: figures, tables, the report page and a saved view."""

from __future__ import annotations

import warnings
from typing import Any

from halfbyte.config import Run
from halfbyte.errors import UserError
from halfbyte.eval.report_record import Report
from halfbyte.run_dir import RunDir
from halfbyte.tracking import choose_mode, start_wandb, where

METRIC, LOW, HIGH = "value", "ci_low", "ci_high"
REPORT_FILES = ("report.json", "report.md", "report.html", "answers.jsonl", "benchmarks.jsonl")
MAX_ROWS = 10_000  # the most that a W&B table shows


def check_workspace(run: Run) -> None:
    """Check before anything is computed that a view can be saved.

    Raises:
        UserError: W&B will not be online, or the library is not installed.
    """
    if choose_mode(run.track.wandb) != "online":
        raise UserError(
            "--workspace saves a view in the W&B project and needs W&B online: set WANDB_API_KEY and"
            " track.wandb=online"
        )
    workspace("entity", run.track.project, [], run.eval.metrics[0])


def track_report(
    run: Run,
    folder: RunDir,
    report: Report,
    answered: list[dict[str, Any]],
    *,
    save_view: bool = False,
) -> str:
    """Record a comparison as a W&B run in the group of its training, and return where it was recorded.

    The summary has each variant's figures (``base-full.exact_match``, …) and the verdict; tables list the
    variants, the benchmarks and every row; the page is shown as it is; an artifact holds all files.

    Args:
        run: the config.
        folder: the run's folder.
        report: the content of report.json.
        answered: the rows of answers.jsonl.
        save_view: whether to save the project's view too.
    """
    wandb_run = start_wandb(run, folder, "eval")
    if wandb_run is None:
        return where(wandb_run)
    wandb_run.summarise(summary(report))
    tables = {
        "variants": _variants(report),
        "benchmarks": _benchmarks(report),
        "rows": _rows(report, answered),
    }
    for name, (columns, rows) in tables.items():
        if rows:
            wandb_run.table(name, columns, rows[:MAX_ROWS])
    wandb_run.page("report", str(folder.eval / "report.html"))
    files = [str(folder.eval / name) for name in REPORT_FILES]
    wandb_run.artifact("comparison", "evaluation", files)
    location = where(wandb_run)
    if save_view and wandb_run.about:
        names = [entry["name"] for entry in report.variants]
        about = wandb_run.about
        view = workspace(about["entity"], about["project"], names, report.metric)
        location = f"{location}, view {view.save().url}"
    wandb_run.finish()
    return location


def summary(report: Report) -> dict[str, Any]:
    """Return the figures of a comparison by their names in W&B."""
    values: dict[str, Any] = {"verdict": report.verdict, "forgetting": report.forgetting}
    for entry in report.variants:
        name = entry["name"]
        for key in ("held_out_loss", "weights_bytes", "disk_bytes", "tokens_per_s"):
            values[f"{name}.{key}"] = entry[key]
        for metric in report.metrics:
            if isinstance(entry.get(metric), dict):
                values[f"{name}.{metric}"] = entry[metric][METRIC]
    for benchmark in report.benchmarks:
        for name, estimate in benchmark["variants"].items():
            values[f"{name}.{benchmark['task']}"] = estimate[METRIC]
    return values


def _variants(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the table of variants."""
    metrics = [m for m in report.metrics if isinstance(report.variants[0].get(m), dict)]
    columns = ["variant"]
    columns += [f"{metric}{end}" for metric in metrics for end in ("", " low", " high")]
    columns += ["held-out loss", "MB in memory", "MB on disk", "tokens/s", "verdict"]
    rows = []
    for entry in report.variants:
        cells = [entry["name"]]
        for metric in metrics:
            cells += [entry[metric][key] for key in (METRIC, LOW, HIGH)]
        cells += [entry["held_out_loss"], entry["weights_bytes"] / 1e6, entry["disk_bytes"] / 1e6]
        rows.append([*cells, entry["tokens_per_s"], entry["verdict"]])
    return columns, rows


def _benchmarks(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the table of benchmarks."""
    columns = ["benchmark", "metric", "questions", "variant", "value", "low", "high", "trained"]
    rows = []
    for benchmark in report.benchmarks:
        for name, estimate in benchmark["variants"].items():
            figures = [estimate[key] for key in (METRIC, LOW, HIGH)]
            verdict = benchmark["differences"].get(name, {}).get("verdict", "")
            head = [benchmark["task"], benchmark["metric"], benchmark["n"], name]
            rows.append([*head, *figures, verdict])
    return columns, rows


def _rows(report: Report, answered: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the table of answers."""
    names = [entry["name"] for entry in report.variants]
    metric = report.metric
    columns = ["place", "prompt", "wanted", *names, *(f"{name} {metric}" for name in names)]
    rows = [
        [
            *(row["place"], row["prompt"], row["wanted"]),
            *(row["answers"][name] for name in names),
            *(row["scores"][name].get(metric) for name in names),
        ]
        for row in answered
    ]
    return columns, rows


def workspace(entity: str, project: str, variants: list[str], metric: str) -> Any:
    """Build a project's view, not yet saved: training, memory, samples, and variants by metric.

    Raises:
        UserError: the library is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its use of pydantic
            import wandb_workspaces.reports.v2 as panels
            import wandb_workspaces.workspaces as views
    except ImportError:
        raise UserError(
            "a workspace needs wandb-workspaces: pip install 'halfbyte[wandb]'"
        ) from None

    def line(title: str, *keys: str) -> Any:
        return panels.LinePlot(title=title, x="step", y=list(keys))

    return views.Workspace(
        entity=entity,
        project=project,
        name="halfbyte",
        sections=[
            views.Section(
                name="Training",
                is_open=True,
                panels=[
                    line("Loss, nats per token", "loss", "eval_loss"),
                    line("Learning rate", "learning_rate"),
                    line("Gradient norm", "grad_norm"),
                    line("Tokens per second", "tokens_per_s"),
                    line("Memory now, bytes", "memory_bytes"),
                    panels.BarPlot(
                        title="Memory: predicted and measured, bytes",
                        metrics=["memory.predicted_peak_bytes", "memory.probe.measured_bytes.peak"],
                    ),
                    panels.WeavePanelSummaryTable(table_name="samples"),
                ],
            ),
            views.Section(
                name="Comparison",
                is_open=True,
                panels=[
                    panels.BarPlot(
                        title=metric, metrics=[f"{variant}.{metric}" for variant in variants]
                    ),
                    panels.WeavePanelSummaryTable(table_name="variants"),
                    panels.WeavePanelSummaryTable(table_name="benchmarks"),
                    panels.WeavePanelSummaryTable(table_name="rows"),
                    panels.MediaBrowser(title="Report", media_keys=["report"]),
                ],
            ),
        ],
    )
