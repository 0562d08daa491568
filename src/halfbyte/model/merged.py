"""Owns what a merged folder says of itself, and that it is not rounded back to the base it came from."""

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
        base: into which the adapter was folded, ``dequantised`` or ``full``.
        dtype: in which its weights are stored.
        weights_bytes: of its files.
        kl_nats_per_token: mean KL(trained ‖ merged) over positions.
        top1_agreement: share of positions with the same most likely next token.
        loss: mean over labelled tokens, in nats.
        num_positions: that were compared.
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
    """``merge_report.json`` of a folder that ``train/merge.py`` wrote.

    Attributes:
        run: name of the run.
        base: that the run was trained on.
        requested: the ``merge.base`` of the config.
        kept: the merge in this folder; ``candidates`` has the others too.
        trained: what they were compared with.
        stored_grids: precisions at whose values the weights lie, but for the little that training added.
        limits: that the kept merge had to meet.
        sha256: of its weight files, by name.
    """

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

    @property
    def grids(self) -> list[str]:
        """Precisions at whose values the weights lie; files of versions before 0.1 do not name them."""
        if self.stored_grids is not None:
            return self.stored_grids
        return [self.trained.precision] if self.kept.base == DEQUANTISED else []


def read_merge_report(folder: Path) -> MergeReport | None:
    """Read what a folder says of the merge that made it, or None where it is no merge.

    Raises:
        ModelError: its merge_report.json is not one of ours.
    """
    path = folder / MERGE_REPORT
    if not path.is_file():
        return None
    try:
        return MergeReport.read(path)
    except RunError as error:
        raise ModelError(f"{error}; or remove it if the folder holds another model") from error


def merged_report(folder: RunDir) -> MergeReport:
    """Read the report of a run's merged model, whose files are those that the merge measured.

    Raises:
        RunError: the run is not merged, or a file has changed since.
    """
    report = MergeReport.read(folder.need(folder.merged / MERGE_REPORT, merge_command(folder)))
    check_merged_files(folder.merged, report)
    return report


def check_merged_files(merged: Path, report: MergeReport) -> None:
    """Check that a merged folder's weights are those that the merge measured.

    Raises:
        RunError: a file is missing or has changed.
    """
    remedy = f"Merge again: {merge_command(RunDir(merged.parent))}"
    check_files(merged, report.sha256, "the file that the merge measured", remedy)


def merge_command(folder: RunDir) -> str:
    """Return the command that merges a run."""
    return f"python train/merge.py {folder.path}"


def grids_of(base: Path, trained: Precision, kept: str) -> list[str]:
    """Return the grids on which a merge lies: those of its base, and the one that it was trained on if kept."""
    merge = read_merge_report(base)
    return sorted({*(merge.grids if merge else ()), *([trained] if kept == DEQUANTISED else ())})


def keeps_training(folder: Path, precision: Precision) -> bool:
    """Return whether a model is still the trained one after rounding to a precision.

    A merge into the dequantised base lies at that base's own grid of values plus a change that is
    small beside the grid's steps, so the same rounding takes the change back: perplexity 1.34 became
    77.6 in NF4 (docs/evaluate.md, "The ladder"). Another 4-bit grid loses much of it too. What is trained
    and merged on top of it lies there still.
    """
    merge = read_merge_report(folder)
    grids = merge.grids if merge else ()
    return precision not in grids and not (precision in FOUR_BIT and set(grids) & set(FOUR_BIT))


def check_keeps_training(folder: Path, precision: Precision) -> None:
    """Refuse a precision that takes the training back.

    Raises:
        ModelError: as ``keeps_training`` says.
    """
    if not keeps_training(folder, precision):
        raise ModelError(
            f"{folder}: was merged into the dequantised base, and {precision} would round it back to what"
            " it was before the training. Use fp32, bf16 or fp16, the run folder itself (the quantised base"
            " with its adapter), or what train/export.py makes of it; merge.base=full makes a merge without"
            " this"
        )
