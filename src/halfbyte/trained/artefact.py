"""Owns the look at an exported artefact before it is used: whether it is still the one that was proven."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, file_sha256, read_json

REPORT = "export_report.json"
# What vLLM takes as --max-lora-rank (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def read_artefact(folder: RunDir, name: str) -> dict[str, Any]:
    """An artefact's report, if its files are those that were proven.

    Raises:
        RunError: it was not made, belongs to another base or template, or a file has changed.
    """
    path = folder.export / name
    kind, _, quant = name.partition("-")
    command = (
        f"python train/export.py {folder.path} --to {kind}{f' --quant {quant}' if quant else ''}"
    )
    report: dict[str, Any] = read_json(folder.need(path / REPORT, command))
    for file, sha256 in report["sha256"].items():
        if not (path / file).is_file() or file_sha256(path / file) != sha256:
            raise RunError(
                f"{path / file}: is not the file that was proven (missing, cut short or changed). Make it"
                f" again: {command}"
            )
    told = read_json(folder.manifest)
    if report["base"]["fingerprint"] != told["base"]["fingerprint"]:
        raise RunError(
            f"{path}: was made from another base than this run's. Make it again: {command}"
        )
    if report["chat_template_sha256"] != told["chat_template_sha256"]:
        raise RunError(
            f"{path}: was made with another chat template than this run's. Make it again: {command}"
        )
    return report


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM with room for ``rank``; None: it has none so large."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)
