"""Owns the report of a merged folder, and the check that rounding does not undo its training."""

from __future__ import annotations

from pathlib import Path

from halfbyte.config.section import FOUR_BIT, Precision
from halfbyte.errors import ModelError, RunError
from halfbyte.model.identity import BaseIdentity
from halfbyte.record import Field, ProvenRecord, RecordPart
from halfbyte.run_dir import RunDir, check_files

MERGE_REPORT = "merge_report.json"
DEQUANTISED = "dequantised"


class MeasuredMerge(RecordPart):
    """One merge, and how close it is to the trained model.

    Attributes:
        base: the base that the adapter was folded into, ``dequantised`` or ``full``.
        dtype: storage dtype of its weights.
        weights_bytes: size of its weight files.
        kl_nats_per_token: mean KL(trained ‖ merged) over positions.
        top1_agreement: share of positions with the same most likely next token.
        loss: mean over labelled tokens, in nats.
        num_positions: number of positions compared.
    """

    base: str
    dtype: str
    weights_bytes: int
    kl_nats_per_token: float
    top1_agreement: float
    loss: float
    num_positions: int


class TrainedModel(RecordPart):
    """The model that a merge is compared with: the base as it was trained on, with its adapter."""

    precision: str
    loss: float


class Measurement(RecordPart):
    """How candidates were compared."""

    rows: int
    positions: int
    arithmetic: str
    reloaded_from_disk: bool


class MergeReport(ProvenRecord):
    """``merge_report.json`` of a folder that ``halfbyte merge`` wrote.

    Attributes:
        run: name of the run.
        base: the base that the run was trained on.
        requested: the ``merge.base`` of the config.
        kept: the merge in this folder; ``candidates`` includes the others too.
        trained: the model that they were compared with.
        stored_grids: precisions whose grid values the weights lie on, apart from training's small changes.
        limits: the limits that the kept merge had to meet.
        sha256: digest of each of its weight files, by name.
        other_sha256: digest of each other file that was there when it was measured: config, tokenizer, template.
    """

    NEWEST = 2
    SEALED = True
    run: str = ""
    base: BaseIdentity
    requested: str | None = None
    kept: MeasuredMerge
    candidates: list[MeasuredMerge] = Field(default_factory=list)
    trained: TrainedModel
    stored_grids: list[str] | None = Field(None, alias="grids")
    measured: Measurement | None = None
    limits: dict[str, float] = Field(default_factory=dict)
    sha256: dict[str, str]
    other_sha256: dict[str, str] = Field(default_factory=dict)

    @property
    def grids(self) -> list[str]:
        """Precisions whose grid values the weights lie on; files of versions before 0.1 omit them."""
        if self.stored_grids is not None:
            return self.stored_grids
        return [self.trained.precision] if self.kept.base == DEQUANTISED else []


def read_merge_report(folder: Path) -> MergeReport | None:
    """Read the merge report of a folder, or return None if the folder is not a merge.

    Raises:
        ModelError: its merge_report.json was not written by halfbyte.
    """
    path = folder / MERGE_REPORT
    if not path.is_file():
        return None
    try:
        return MergeReport.read(path)
    except RunError as error:
        raise ModelError(f"{error}; or remove it if the folder holds another model") from error


def merged_report(folder: RunDir) -> MergeReport:
    """Read the report of a run's merged model, and check that its files are those that were measured.

    Raises:
        RunError: the run is not merged, or a file has changed since.
    """
    report = MergeReport.read(folder.need(folder.merged / MERGE_REPORT, merge_command(folder)))
    check_merged_files(folder.merged, report)
    return report


def check_merged_files(merged: Path, report: MergeReport) -> None:
    """Check that a merged folder's weights, config and tokenizer are those that the merge measured.

    Raises:
        RunError: a file is missing or has changed.
    """
    remedy = f"Merge again: {merge_command(RunDir(merged.parent))}"
    check_files(
        merged, report.sha256 | report.other_sha256, "the file that the merge measured", remedy
    )


def verified_merge(folder: Path) -> MergeReport | None:
    """Return the report of a merged folder whose files are those that were measured, or None if it is no merge.

    Raises:
        RunError: a file is missing or has changed.
        ModelError: as ``read_merge_report``.
    """
    report = read_merge_report(folder)
    if report is not None:
        check_merged_files(folder, report)
    return report


def merge_command(folder: RunDir) -> str:
    """Return the command that merges a run."""
    return f"halfbyte merge {folder.path}"


def grids_of(base: Path, trained: Precision, kept: str) -> list[str]:
    """Return the grids of a merge: those of its base, and the trained one if the dequantised base is kept."""
    merge = read_merge_report(base)
    return sorted({*(merge.grids if merge else ()), *([trained] if kept == DEQUANTISED else ())})


def keeps_training(folder: Path, precision: Precision) -> bool:
    """Return whether a model keeps its training after rounding to a precision.

    A merge into the dequantised base consists of that base's grid values plus changes that are small
    compared with the grid's steps, so the same rounding undoes the changes: perplexity 1.34 became 77.6 in
    NF4 (docs/evaluate.md, "The ladder"). Another 4-bit grid loses much of them too. A model that is trained
    and merged on top of such a merge still lies on that grid.
    """
    merge = read_merge_report(folder)
    grids = merge.grids if merge else ()
    return precision not in grids and not (precision in FOUR_BIT and set(grids) & set(FOUR_BIT))


def check_keeps_training(folder: Path, precision: Precision) -> None:
    """Refuse a precision whose rounding undoes the training.

    Raises:
        ModelError: ``keeps_training`` is false.
    """
    if not keeps_training(folder, precision):
        raise ModelError(
            f"{folder}: was merged into the dequantised base, and {precision} would round it back to what"
            " it was before the training. Use fp32, bf16 or fp16, the run folder itself (the quantised base"
            " with its adapter), or what halfbyte export makes of it; merge.base=full makes a merge without"
            " this"
        )
