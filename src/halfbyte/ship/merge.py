"""Owns the merge: fold the adapter into both bases, measure both from disk, keep the faithful one."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.config import Run
from halfbyte.errors import RunError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.load import load_config, load_model
from halfbyte.model.merged import DEQUANTISED, MERGE_REPORT, grids_of
from halfbyte.model.precision import DTYPES, NAMES, Compute
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.run_dir import RunDir, file_sha256, provenance, replace_folder, write_json, write_text
from halfbyte.ship.card import model_card
from halfbyte.ship.merge_math import merged_tensors, write_shards
from halfbyte.ship.work import Work, measuring
from halfbyte.trained.fidelity import Fidelity, Reference, fidelity, torch_predict

if TYPE_CHECKING:
    from torch import nn

FULL = "full"


@dataclass(frozen=True)
class Candidate:
    """One merge on disk, measured after reloading it."""

    base: str
    dtype: str
    folder: Path
    weights_bytes: int
    fidelity: Fidelity

    def as_json(self) -> dict[str, Any]:
        """For merge_report.json."""
        return {
            "base": self.base,
            "dtype": self.dtype,
            "weights_bytes": self.weights_bytes,
            **self.fidelity.as_json(),
        }


def merge(folder: RunDir, run: Run) -> dict[str, Any]:
    """Write ``merged/`` and return the content of its merge_report.json.

    The trained model is the quantised base with its adapter. Each candidate is written, reloaded
    from disk and compared with it in fp32 where memory allows, so that the figures are about the
    weights and not about the arithmetic of one device.

    Raises:
        RunError: the run is not trained, or the kept merge misses ``merge.max_kl`` or
            ``merge.min_top1``; then nothing is kept.
    """
    work = Work(folder, run)
    trained = work.load_base()
    arithmetic = measuring(num_parameters(trained.model))
    model, told = work.reference(trained, arithmetic)
    dtype = DTYPES[run.merge.dtype] if run.merge.dtype != "auto" else _stored_dtype(work.base)
    candidates = []
    try:
        if run.model.precision not in DTYPES:
            candidates.append(_candidate(work, DEQUANTISED, trained.model, dtype, arithmetic, told))
        del model, trained
        gc.collect()
        full = load_model(work.base, NAMES[_stored_dtype(work.base)], compute=_as_stored(work.base))
        candidates.append(_candidate(work, FULL, full.model, dtype, arithmetic, told))
        del full
        gc.collect()
        kept = _choose(candidates, run)
        report = _report(work, candidates, kept, told, arithmetic)
        _finish(work, kept, report)
    finally:
        for base in (FULL, DEQUANTISED):
            shutil.rmtree(_scratch(folder, base), ignore_errors=True)
    return report


def _stored_dtype(base: Base) -> torch.dtype:
    config = load_config(base)
    # Multimodal checkpoints name it at the top alone.
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if dtype in NAMES else torch.float32


def _as_stored(base: Base) -> Compute:
    return Compute(torch.device("cpu"), _stored_dtype(base), "as stored")


def _candidate(
    work: Work,
    base: str,
    model: nn.Module,
    dtype: torch.dtype,
    arithmetic: Compute,
    told: Reference,
) -> Candidate:
    """Fold into ``model``, write, reload from disk, measure."""
    from transformers import GenerationConfig

    folder = _scratch(work.folder, base)
    shutil.rmtree(folder, ignore_errors=True)
    num_bytes = write_shards(folder, merged_tensors(model, work.updates, dtype))
    config: Any = model.config
    plain = config.__class__.from_dict(
        {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    )
    plain.dtype = dtype
    plain.architectures = [type(model).__name__]
    plain.save_pretrained(folder)
    settings = GenerationConfig(
        bos_token_id=work.renderer.tokenizer.bos_token_id,
        eos_token_id=work.renderer.stop_ids,
        pad_token_id=work.pad_id,
    )
    settings.save_pretrained(folder)
    work.renderer.tokenizer.save_pretrained(folder)
    reloaded = load_model(resolve_base(str(folder)), arithmetic.name, compute=arithmetic)
    measured = fidelity(torch_predict(reloaded.model, work.pad_id), work.rows, told)
    return Candidate(base, NAMES[dtype], folder, num_bytes, measured)


def _choose(candidates: list[Candidate], run: Run) -> Candidate:
    """The candidate that the config asks for, if it is close enough to the trained model."""
    wanted = run.merge.base
    named = {candidate.base: candidate for candidate in candidates}
    if wanted == "closer":
        kept = min(candidates, key=lambda candidate: candidate.fidelity.kl_nats_per_token)
    elif wanted in named:
        kept = named[wanted]
    else:
        raise RunError(
            f"merge.base is {wanted}, but the run trained on an unquantised {run.model.precision} base;"
            " use full or closer"
        )
    found = kept.fidelity
    close = (
        found.kl_nats_per_token <= run.merge.max_kl and found.top1_agreement >= run.merge.min_top1
    )
    if not close:
        measured = "; ".join(
            f"{c.base} base in {c.dtype}: KL {c.fidelity.kl_nats_per_token:.2e} nats/token, top-1"
            f" {c.fidelity.top1_agreement:.2%}"
            for c in candidates
        )
        raise RunError(
            f"the merged model is not the trained one: {measured}; allowed: KL {run.merge.max_kl:g},"
            f" top-1 {run.merge.min_top1:.0%}. Nothing was kept. Use merge.base=closer or"
            " merge.dtype=fp32, or accept it with merge.max_kl and merge.min_top1"
        )
    return kept


def _report(
    work: Work, candidates: list[Candidate], kept: Candidate, told: Reference, arithmetic: Compute
) -> dict[str, Any]:
    files = sorted(kept.folder.glob("*.safetensors"))
    return {
        "run": work.run.name,
        "base": work.base.as_json(),
        "asked": work.run.merge.base,
        "kept": kept.as_json(),
        "candidates": [candidate.as_json() for candidate in candidates],
        "trained": {"precision": work.run.model.precision, "loss": told.loss},
        "grids": grids_of(Path(work.base.path), work.run.model.precision, kept.base),
        "measured": {
            "rows": len(work.rows),
            "positions": len(told.log_probs),
            "arithmetic": f"{arithmetic.name} on {arithmetic.device}",
            "reloaded_from_disk": True,
        },
        "limits": {"max_kl": work.run.merge.max_kl, "min_top1": work.run.merge.min_top1},
        "sha256": {file.name: file_sha256(file) for file in files},
        **provenance(),
    }


def _finish(work: Work, kept: Candidate, report: dict[str, Any]) -> None:
    write_json(kept.folder / MERGE_REPORT, report)
    write_text(kept.folder / "README.md", model_card(work.told, report, work.run))
    replace_folder(kept.folder, work.folder.merged)


def _scratch(folder: RunDir, base: str) -> Path:
    return folder.path / f".merging-{base}"
