"""Owns the comparison in Weights & Biases: its figures, tables and page, and the saved view of a project."""

from __future__ import annotations

import warnings
from typing import Any

from halfbyte.config import Run
from halfbyte.errors import UserError
from halfbyte.run_dir import RunDir
from halfbyte.tracking import choose_mode, start_wandb, where

METRIC, LOW, HIGH = "value", "ci_low", "ci_high"
REPORT_FILES = ("report.json", "report.md", "report.html", "answers.jsonl", "benchmarks.jsonl")
MAX_ROWS = 10_000  # W&B's tables end there


def check_workspace(run: Run) -> None:
    """Whether a view can be saved, before anything is computed.

    Raises:
        UserError: W&B will not be online, or the library is not installed.
    """
    if choose_mode(run.track.wandb) != "online":
        raise UserError(
            "--workspace saves a view in W&B's project and needs W&B online: set WANDB_API_KEY, and"
            " track.wandb=online"
        )
    workspace("entity", run.track.project, [], run.eval.metrics[0])


def track_report(
    run: Run,
    folder: RunDir,
    report: dict[str, Any],
    answered: list[dict[str, Any]],
    *,
    save_view: bool = False,
) -> str:
    """Record a comparison as a W&B run in the group of its training; returns where it went.

    The summary has each variant's figures (``base-full.exact_match``, …) and the verdict; tables have the
    variants, the benchmarks and every row; the page is shown as it is; all files are an artifact.
    ``save_view``: also save the project's view.
    """
    started = start_wandb(run, folder, "eval")
    if started is None:
        return where(started)
    import wandb

    started.summary.update(summary(report))
    tables = {
        "variants": _variants(report),
        "benchmarks": _benchmarks(report),
        "rows": _rows(report, answered),
    }
    for name, (columns, rows) in tables.items():
        if rows:
            started.log({name: wandb.Table(columns=columns, data=rows[:MAX_ROWS])})
    page = folder.eval / "report.html"
    started.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    artifact = wandb.Artifact(f"comparison-{started.id}", type="evaluation")
    for name in REPORT_FILES:
        if (folder.eval / name).is_file():
            artifact.add_file(str(folder.eval / name))
    started.log_artifact(artifact)
    told = where(started)
    if save_view:
        names = [entry["name"] for entry in report["variants"]]
        view = workspace(started.entity, started.project, names, report["metric"])
        told = f"{told}, view {view.save().url}"
    started.finish()
    return told


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a comparison, by the names that they have in W&B."""
    values: dict[str, Any] = {"verdict": report["verdict"], "forgetting": report["forgetting"]}
    for entry in report["variants"]:
        name = entry["name"]
        for key in ("held_out_loss", "weights_bytes", "disk_bytes", "tokens_per_s"):
            values[f"{name}.{key}"] = entry[key]
        for metric in report["metrics"]:
            if isinstance(entry.get(metric), dict):
                values[f"{name}.{metric}"] = entry[metric][METRIC]
    for benchmark in report["benchmarks"]:
        for name, told in benchmark["variants"].items():
            values[f"{name}.{benchmark['task']}"] = told[METRIC]
    return values


def _variants(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    metrics = [m for m in report["metrics"] if isinstance(report["variants"][0].get(m), dict)]
    columns = ["variant"]
    columns += [f"{metric}{end}" for metric in metrics for end in ("", " low", " high")]
    columns += ["held-out loss", "MB in memory", "MB on disk", "tokens/s", "verdict"]
    rows = []
    for entry in report["variants"]:
        cells = [entry["name"]]
        for metric in metrics:
            cells += [entry[metric][key] for key in (METRIC, LOW, HIGH)]
        cells += [entry["held_out_loss"], entry["weights_bytes"] / 1e6, entry["disk_bytes"] / 1e6]
        rows.append([*cells, entry["tokens_per_s"], entry["verdict"]])
    return columns, rows


def _benchmarks(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = ["benchmark", "metric", "questions", "variant", "value", "low", "high", "trained"]
    rows = []
    for benchmark in report["benchmarks"]:
        for name, told in benchmark["variants"].items():
            figures = [told[key] for key in (METRIC, LOW, HIGH)]
            verdict = benchmark["differences"].get(name, {}).get("verdict", "")
            head = [benchmark["task"], benchmark["metric"], benchmark["n"], name]
            rows.append([*head, *figures, verdict])
    return columns, rows


def _rows(
    report: dict[str, Any], answered: list[dict[str, Any]]
) -> tuple[list[str], list[list[Any]]]:
    names = [entry["name"] for entry in report["variants"]]
    metric = report["metric"]
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
    """The saved view of a project, not yet saved: training, memory, samples, and variants by metric.

    Raises:
        UserError: the library is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of pydantic
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
