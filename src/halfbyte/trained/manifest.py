"""Owns the manifest, which records the origin of a run's base, data and code, and the run's cost."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import RunError
from halfbyte.faults import train_command
from halfbyte.model.identity import BaseIdentity
from halfbyte.record import ProvenRecord, RecordPart
from halfbyte.run_dir import RunDir, check_files


class ComputeDtype(RecordPart):
    """The dtype of the matrix products, and the reason for choosing it."""

    name: str
    why: str = ""


class Manifest(ProvenRecord):
    """The contents of ``manifest.json``; each figure is added once the run has measured it.

    Attributes:
        base: the base that was trained.
        precision: precision of the stored weights.
        device: the device that trained, by its torch name.
        chat_template_sha256: digest of the template that rendered the rows.
        tokenizer_sha256: digest of the rules of the tokenizer; None in files before it was recorded.
        stop_ids: tokens that end an answer.
        seconds: total time of all attempts.
        finished: whether the adapter is saved.
        adapter_sha256: digest of each file of the adapter's folder, by name; None in files before version 2.
        ledger_sha256: digest of ``ledger.json``, which has those of the kept rows; None as above.
        memory: the planned memory and its measured counterpart.
        held_out_loss: loss in nats per labelled token; None without held-out rows.
    """

    NEWEST = 2
    SEALED = True
    name: str
    base: BaseIdentity
    model_class: str
    text_only: bool = False
    vision_modules: int = 0
    precision: str
    compute_dtype: ComputeDtype
    device: str
    chat_template_sha256: str
    tokenizer_sha256: str | None = None
    stop_ids: list[int]
    bos_per_row: int = 0
    seconds: float = 0.0
    finished: bool = False
    adapter_sha256: dict[str, str] | None = None
    ledger_sha256: str | None = None
    memory: dict[str, Any] | None = None
    steps: int | None = None
    num_tokens: int | None = None
    trainable: int | None = None
    adapted_layers: int | None = None
    peak_memory_bytes: int | None = None
    training_seconds: float | None = None
    held_out_loss: float | None = None
    wandb: str | None = None


def read_manifest(folder: RunDir) -> Manifest | None:
    """Return the manifest of a run, or None if its training has not begun.

    Raises:
        RunError: the manifest cannot be read.
    """
    return Manifest.read(folder.manifest) if folder.manifest.is_file() else None


def finished_manifest(folder: RunDir) -> Manifest:
    """Return the manifest of a finished training.

    Raises:
        RunError: the training has not finished.
    """
    command = train_command(folder.config)
    folder.need(folder.adapter / "adapter_config.json", command)
    manifest = read_manifest(folder)
    if manifest is None or not manifest.finished:
        raise RunError(f"{folder.path}: its training has not finished. Go on with it: {command}")
    check_adapter_files(folder, manifest)
    return manifest


def check_adapter_files(folder: RunDir, manifest: Manifest) -> None:
    """Check that the adapter and the ledger of a finished training are those that it wrote.

    Raises:
        RunError: a file is missing or has changed.
    """
    remedy = "Put back the file, or train again with train.existing=replace"
    subject = "the file that the training wrote"
    check_files(folder.adapter, manifest.adapter_sha256 or {}, subject, remedy)
    if manifest.ledger_sha256 is not None:
        check_files(folder.path, {folder.ledger.name: manifest.ledger_sha256}, subject, remedy)
