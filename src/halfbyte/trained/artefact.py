"""Owns the report of an exported artefact, and the check that the artefact is unchanged since its proof."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import RunError
from halfbyte.model.identity import BaseIdentity, check_same_base
from halfbyte.record import Field, ProvenRecord, RecordPart
from halfbyte.run_dir import RunDir, check_files
from halfbyte.trained.manifest import finished_manifest

REPORT = "export_report.json"
# The values that vLLM accepts for --max-lora-rank (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Closeness(RecordPart):
    """How close one model is to another; see ``fidelity.Fidelity``."""

    kl_nats_per_token: float
    top1_agreement: float
    loss: float
    num_positions: int


class MergedModel(RecordPart):
    """The merged model that an artefact is compared with."""

    perplexity: float
    against_trained: Closeness


class ExportReport(ProvenRecord):
    """``export_report.json`` of an artefact: how it was made, and its proof.

    Attributes:
        run: name of the run.
        name: name of the artefact and of its folder.
        kind: ``gguf``, ``gguf-lora``, ``awq`` or ``adapter``.
        method: how it was made.
        num_bytes: total size of its files.
        base: the base that the run was trained on.
        rows: number of rows measured.
        perplexity_change: change of the perplexity relative to the merged model's.
        conversations: number of prompts compared; ``same_text`` and ``same_ids`` of them are identical.
        scores: the run's own metrics, each with its interval.
        limits: the limits of the config that it had to meet.
        sha256: digest of each of its files, by name.
    """

    NEWEST = 2
    SEALED = True
    run: str
    name: str
    kind: str
    method: dict[str, Any] = Field(alias="made")
    num_bytes: int = Field(alias="bytes")
    base: BaseIdentity
    chat_template_sha256: str
    merged: MergedModel
    rows: int
    against_trained: Closeness
    against_merged: Closeness
    perplexity: float
    perplexity_change: float
    conversations: int
    same_text: int
    same_ids: int
    scores: dict[str, dict[str, Any]] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)
    sha256: dict[str, str]


def read_artefact(folder: RunDir, name: str) -> ExportReport:
    """Read an artefact's report, and check that its files are those that were proven.

    Raises:
        RunError: it was not made, belongs to another base or template, or a file has changed.
    """
    path = folder.export / name
    kind, _, quant = name.partition("-")
    command = f"halfbyte export {folder.path} --to {kind}{f' --quant {quant}' if quant else ''}"
    remedy = f"Make it again: {command}"
    report = ExportReport.read(folder.need(path / REPORT, command))
    check_files(path, report.sha256, "the file that was proven", remedy)
    manifest = finished_manifest(folder)
    check_same_base(report.base, manifest.base, f"{path}: was made from", remedy)
    if report.chat_template_sha256 != manifest.chat_template_sha256:
        raise RunError(f"{path}: was made with another chat template than this run's. {remedy}")
    return report


def vllm_rank(rank: int) -> int | None:
    """Return vLLM's smallest --max-lora-rank that is at least ``rank``, or None if there is none."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)
