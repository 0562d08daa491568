"""Owns what a merged folder says of itself, and that it is not rounded back to the base it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config.section import FOUR_BIT, Precision
from halfbyte.errors import ModelError
from halfbyte.run_dir import read_json

MERGE_REPORT = "merge_report.json"
DEQUANTISED = "dequantised"


@dataclass(frozen=True)
class MergeReport:
    """A folder of ``train/merge.py``.

    Attributes:
        dtype: in which its weights are stored.
        grids: precisions at whose values the weights lie, but for the little that training added.
        sha256: of its files, by name.
    """

    dtype: str
    grids: tuple[str, ...]
    sha256: dict[str, str]


def read_merge_report(folder: Path) -> MergeReport | None:
    """What a folder says of the merge that made it, or None where it is no merge.

    Raises:
        ModelError: its merge_report.json is not one of ours.
    """
    path = folder / MERGE_REPORT
    if not path.is_file():
        return None
    report: Any = read_json(path)
    try:
        kept, trained = report["kept"], report["trained"]["precision"]
        # Reports of earlier versions do not name the grids of the base.
        own = [trained] if kept["base"] == DEQUANTISED else []
        grids = report.get("grids", own)
        return MergeReport(kept["dtype"], tuple(grids), dict(report["sha256"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: is not what train/merge.py writes ({type(error).__name__}: {error}); merge again, or"
            " remove the file if the folder holds another model"
        ) from error


def grids_of(base: Path, trained: Precision, kept: str) -> list[str]:
    """Grids on which a merge lies: those of its base, and the one that it was trained on if it was kept."""
    merge = read_merge_report(base)
    return sorted({*(merge.grids if merge else ()), *([trained] if kept == DEQUANTISED else ())})


def keeps_training(folder: Path, precision: Precision) -> bool:
    """Whether a model is still the trained one after rounding to a precision.

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
