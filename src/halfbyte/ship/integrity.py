"""Owns what is looked at before an export: that the merged model is whole, unchanged, and this run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from halfbyte.errors import RunError
from halfbyte.model.load import load_config
from halfbyte.model.merged import MERGE_REPORT
from halfbyte.model.resolve import Base
from halfbyte.model.skeleton import build
from halfbyte.run_dir import RunDir, file_sha256, read_json

EMBEDDINGS = ("lm_head", "embed_tokens", "wte", "embed_out")
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def check_adapter(folder: RunDir, base: Base) -> None:
    """Whether the adapter can go anywhere but onto its own base in PEFT.

    Raises:
        RunError: the file is damaged, or it adapts an embedding that is tied to the head.
    """
    path = folder.trained() / "adapter_model.safetensors"
    names = _tensor_names(path)
    layers = {part for name in names for part in name.split(".")}
    touched = sorted(layers & set(EMBEDDINGS))
    if touched and load_config(base).get_text_config().tie_word_embeddings:
        raise RunError(
            f"{path}: a LoRA on {', '.join(touched)}, which the base ties to one matrix: folded in, it"
            " would change both the embedding and the head, and no file format has a place for it on one"
            " side alone. Train with adapter.targets=all-linear, which leaves both out"
        )


def check_merged(folder: RunDir, base: Base, template_sha256: str) -> dict[str, Any]:
    """The content of merge_report.json, if the merged model is the one that it measured.

    Raises:
        RunError: not merged, another base, a quantised or damaged checkpoint, or another tokenizer or
            chat template; the message says which.
    """
    merged, again = folder.merged, f"python train/merge.py {folder.path}"
    report: dict[str, Any] = read_json(folder.need(merged / MERGE_REPORT, again))
    if report["base"]["fingerprint"] != base.fingerprint:
        raise RunError(
            f"{merged}: merged into another base (fingerprint {report['base']['fingerprint'][:12]}) than"
            f" the run's {base.name} ({base.fingerprint[:12]}). Merge again: {again}"
        )
    config = read_json(merged / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise RunError(
            f"{merged}: is quantised already ({method}): quantising it once more would lose what the merge"
            f" measured. The source of an export is the 16- or 32-bit merge: {again}"
        )
    expected = _expected_names(merged)
    found: set[str] = set()
    for name in report["sha256"]:
        found |= _tensor_names(merged / name)
    if found != expected:
        odd = sorted(found ^ expected)
        raise RunError(
            f"{merged}: {len(odd)} tensor names are not those of its architecture: {odd[:3]}. Merge again:"
            f" {again}"
        )
    for name, sha256 in report["sha256"].items():
        if file_sha256(merged / name) != sha256:
            raise RunError(
                f"{merged / name}: is not the file that the merge measured (sha256 differs). Merge again:"
                f" {again}"
            )
    _check_words(folder, template_sha256, again)
    return report


def _check_words(folder: RunDir, template_sha256: str, again: str) -> None:
    """Whether tokenizer and chat template are those of the training."""
    if read_json(folder.manifest)["chat_template_sha256"] != template_sha256:
        raise RunError(
            f"{folder.adapter}: its chat template is not the one that the run was trained with (sha256"
            " differs from manifest.json)"
        )
    for name, what in ((TOKENIZER, "tokenizer"), (TEMPLATE, "chat template")):
        ours, theirs = folder.merged / name, folder.adapter / name
        if _content(ours) != _content(theirs):
            raise RunError(
                f"{ours}: another {what} than the run was trained with ({theirs}). Merge again: {again}"
            )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _expected_names(folder: Path) -> set[str]:
    """Names of the weights of the architecture in config.json, tied ones once."""
    return {name for name, _ in _skeleton(folder).named_parameters()}


def linear_widths(folder: Path) -> set[int]:
    """Input widths of the linear layers of a model folder, without its head."""
    model = _skeleton(folder)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return {layer.in_features for layer in layers}


def _skeleton(folder: Path) -> Any:
    config = load_config(Base(str(folder), str(folder), None, "", ""))
    return build(config, torch.float32, text_only=True)


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the folder is not complete") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: is damaged or cut short: {error}") from None
