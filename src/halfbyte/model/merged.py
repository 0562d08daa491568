"""Owns what a merged folder says of itself, and that it is not rounded back to the base it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.config.section import Precision
from halfbyte.errors import ModelError
from halfbyte.run_dir import read_json

MERGE_REPORT = "merge_report.json"
DEQUANTISED = "dequantised"
FOUR_BITS = ("nf4", "fp4")


def merge_report(folder: Path) -> dict[str, Any] | None:
    """The content of merge_report.json, or None where the folder is not of ``train/merge.py``."""
    path = folder / MERGE_REPORT
    return read_json(path) if path.is_file() else None


def keeps_training(folder: Path, precision: Precision) -> bool:
    """Whether a model is still the trained one after rounding to a precision.

    A merge into the dequantised base lies at that base's own grid of values plus a change that is
    small beside the grid's steps, so the same rounding takes the change back: perplexity 1.34 became
    77.6 in NF4 (docs/evaluate.md, "The ladder"). Another 4-bit grid loses much of it too.
    """
    report = merge_report(folder)
    if report is None or report["kept"]["base"] != DEQUANTISED:
        return True
    trained = report["trained"]["precision"]
    return precision != trained and not (precision in FOUR_BITS and trained in FOUR_BITS)


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
