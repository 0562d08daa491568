"""Owns the model cards: what a merged model or artefact is, its origin, and its measurements."""

from __future__ import annotations

import json

from halfbyte.config import Run
from halfbyte.data.ledger import Ledger
from halfbyte.model.merged import MergeReport
from halfbyte.run_dir import RunDir
from halfbyte.ship.export_report import as_markdown
from halfbyte.trained.artefact import ExportReport
from halfbyte.trained.manifest import Manifest, finished_manifest


def model_card(manifest: Manifest, report: MergeReport, run: Run) -> str:
    """Return the README.md of a merged model; every figure comes from the run's own files."""
    base, kept = manifest.base, report.kept
    assert report.measured is not None
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {base.name}"] if base.revision else []),
        "tags: [halfbyte, qlora]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"Fine-tuned with halfbyte {manifest.halfbyte} from: {base.origin}. The licence of the"
        " base applies.",
        "",
        "| training | |",
        "| --- | --- |",
        f"| base precision | {manifest.precision}, {manifest.compute_dtype.name} compute |",
        f"| LoRA | r {run.adapter.r}, alpha {run.adapter.alpha:g}, {manifest.adapted_layers} layers,"
        f" {(manifest.trainable or 0) / 1e6:.2f} M weights |",
        f"| steps | {manifest.steps} of {run.train.batch_size} rows, peak learning rate"
        f" {run.train.learning_rate:g} |",
    ]
    if manifest.held_out_loss is not None:
        lines.append(f"| held-out loss | {manifest.held_out_loss:.4f} nats per labelled token |")
    lines += [
        "",
        f"The adapter is folded into the {kept.base} base and stored in {kept.dtype}. Against the"
        f" trained model, on {report.measured.positions} held-out positions and after reloading"
        f" from disk: KL {kept.kl_nats_per_token:.2e} nats per token, top-1 agreement"
        f" {kept.top1_agreement:.2%}, loss {kept.loss:.4f} (trained: {report.trained.loss:.4f}).",
        "",
        "The chat template that it was trained with comes with the tokenizer.",
        "",
    ]
    return "\n".join(lines)


def artefact_card(folder: RunDir, report: ExportReport) -> str:
    """Return the README.md of an exported artefact: its proof, its data, and its base and licences."""
    manifest, ledger = finished_manifest(folder), Ledger.read(folder.ledger)
    counts = ledger.model_dump(include={"rows_in", "trained", "held_out", "dropped"})
    base = manifest.base
    lines = [
        "---",
        "pipeline_tag: text-generation",
        *([f"base_model: {base.name}"] if base.revision else []),
        "tags: [halfbyte, qlora]",
        "---",
        "",
        f"# {report.run}, {report.name}",
        "",
        f"Fine-tuned with halfbyte {manifest.halfbyte} from: {base.origin}. The licences of the base and"
        " of the data apply.",
        "",
        "## Proof",
        "",
        as_markdown([report]),
        "## Data",
        "",
        "```json",
        json.dumps(counts, indent=2, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)
