"""Owns the checks before an export: the merged model must be complete, unchanged, and from this run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from halfbyte.errors import RunError
from halfbyte.model.identity import check_same_base
from halfbyte.model.load import load_config, read_config
from halfbyte.model.merged import (
    MERGE_REPORT,
    MergeReport,
    check_merged_files,
    merge_command,
)
from halfbyte.model.skeleton import build
from halfbyte.run_dir import read_json
from halfbyte.trained.run import TrainedRun

EMBEDDINGS = ("lm_head", "embed_tokens", "wte", "embed_out")
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def check_adapter(trained: TrainedRun) -> None:
    """Check that the adapter can be merged into its base, and not only be used through PEFT.

    Raises:
        RunError: the file is damaged, or it adapts an embedding that is tied to the head.
    """
    path = trained.folder.adapter / "adapter_model.safetensors"
    names = _tensor_names(path)
    layers = {part for name in names if "lora_" in name for part in name.split(".")}
    touched = sorted(layers & set(EMBEDDINGS))
    if touched and load_config(trained.base).get_text_config().tie_word_embeddings:
        raise RunError(
            f"{path}: a LoRA on {', '.join(touched)}, which the base ties to one matrix: folded in, it"
            " would change both the embedding and the head, and no file format has a place for it on one"
            " side alone. Train with adapter.targets=all-linear, which leaves both out"
        )


def check_merged(trained: TrainedRun) -> MergeReport:
    """Check that the merged model is the one that was measured, and return its merge_report.json.

    Raises:
        RunError: the run is not merged, or has another base, a quantised or damaged checkpoint, or
            another tokenizer or chat template; the message says which.
    """
    folder, merged, again = trained.folder, trained.folder.merged, merge_command(trained.folder)
    report = MergeReport.read(folder.need(merged / MERGE_REPORT, again))
    remedy = f"Merge again: {again}"
    check_same_base(report.base, trained.base.identity, f"{merged}: was merged into", remedy)
    config = read_json(merged / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise RunError(
            f"{merged}: is quantised already ({method}): quantising it once more would lose what the merge"
            f" measured. The source of an export is the 16- or 32-bit merge: {again}"
        )
    expected = _expected_names(merged)
    names = {tensor for file in report.sha256 for tensor in _tensor_names(merged / file)}
    if names != expected:
        odd = sorted(names ^ expected)
        raise RunError(
            f"{merged}: {len(odd)} tensor names are not those of its architecture: {odd[:3]}. {remedy}"
        )
    check_merged_files(merged, report)
    for name, what in ((TOKENIZER, "tokenizer"), (TEMPLATE, "chat template")):
        ours, theirs = merged / name, folder.adapter / name
        if _content(ours) != _content(theirs):
            raise RunError(
                f"{ours}: another {what} than the run was trained with ({theirs}). {remedy}"
            )
    return report


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _expected_names(folder: Path) -> set[str]:
    """Return the names of the weights of the architecture in config.json, with tied ones once."""
    return {name for name, _ in _skeleton(folder).named_parameters()}


def linear_widths(folder: Path) -> set[int]:
    """Return the input widths of the linear layers of a model folder, except for its head."""
    model = _skeleton(folder)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return {layer.in_features for layer in layers}


def _skeleton(folder: Path) -> Any:
    config = read_config(folder, str(folder))
    return build(config, torch.float32, text_only=True)


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the folder is not complete") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: is damaged or cut short: {error}") from None
