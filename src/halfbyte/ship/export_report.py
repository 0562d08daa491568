"""Owns the table of a run's exported artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.run_dir import write_json, write_text
from halfbyte.trained.artefact import REPORT, ExportReport


def write_table(folder: Path) -> None:
    """Write ``export_report.json`` and ``.md`` of all artefacts in an export folder."""
    reports = [ExportReport.read(path) for path in sorted(folder.glob(f"*/{REPORT}"))]
    write_json(folder / REPORT, {"artefacts": [report.as_json() for report in reports]})
    write_text(folder / "export_report.md", as_markdown(reports))


def as_markdown(reports: list[ExportReport]) -> str:
    """Return a Markdown table of the artefacts, with the merged model first."""
    metrics = sorted({metric for report in reports for metric in report.scores})
    columns = ["artefact", "size", "KL to trained", "top-1", "KL to merged", "top-1"]
    columns += ["perplexity", "change", "same prompts", *metrics]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    if reports:
        model = reports[0].merged
        close = model.against_trained
        cells = [
            "merged",
            "",
            f"{close.kl_nats_per_token:.2e}",
            f"{close.top1_agreement:.2%}",
        ]
        cells += ["0", "100%", f"{model.perplexity:.4f}", "", ""]
        lines.append("| " + " | ".join([*cells, *[""] * len(metrics)]) + " |")
    for report in reports:
        trained, merged = report.against_trained, report.against_merged
        cells = [
            report.name,
            f"{report.num_bytes / 1e6:.1f} MB",
            f"{trained.kl_nats_per_token:.2e}",
            f"{trained.top1_agreement:.2%}",
            f"{merged.kl_nats_per_token:.2e}",
            f"{merged.top1_agreement:.2%}",
            f"{report.perplexity:.4f}",
            f"{report.perplexity_change:+.2%}",
            f"{report.same_ids} of {report.conversations}",
        ]
        for metric in metrics:
            score = report.scores.get(metric)
            cells.append(_interval(score) if score else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "KL in nats per token and share of equal most likely tokens, over the positions of held-out rows;"
        " perplexity over labelled tokens, its change from the merged model's. Same prompts: conversations"
        " whose rendered text and token ids equal those of the training.",
        "",
    ]
    return "\n".join(lines)


def _interval(score: dict[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['ci_low']:.3f}, {score['ci_high']:.3f}]"
