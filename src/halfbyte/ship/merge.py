"""Owns the merge: it folds the adapter into both bases, measures both from disk, and keeps the closer one."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.config import Run
from halfbyte.errors import RunError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.load import load_model, stored_dtype
from halfbyte.model.merged import (
    DEQUANTISED,
    MERGE_REPORT,
    MeasuredMerge,
    Measurement,
    MergeReport,
    TrainedModel,
    grids_of,
)
from halfbyte.model.precision import DTYPES, NAMES, Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import save_tokenizer
from halfbyte.run_dir import RunDir, digests, provenance, replace_folder, write_text
from halfbyte.ship.card import model_card
from halfbyte.ship.measured_run import MeasuredRun, measuring_compute
from halfbyte.ship.merge_math import merged_tensors, read_updates, write_shards
from halfbyte.trained.fidelity import Reference, fidelity, torch_predict
from halfbyte.trained.run import read_trained_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL = "full"


@dataclass(frozen=True)
class Candidate:
    """A merge on disk, measured after it was reloaded."""

    folder: Path
    measured: MeasuredMerge


@dataclass(frozen=True)
class Trained:
    """The reference for candidates: the trained model's predictions, and the dtype that computed them."""

    measured: MeasuredRun
    reference: Reference
    arithmetic: Compute


def merge(path: Path, run: Run) -> MergeReport:
    """Write ``merged/`` and return the content of its merge_report.json.

    The trained model is the quantised base with its adapter. Each candidate is written, reloaded from
    disk and compared with the trained model, in fp32 where memory allows, so that the figures reflect
    the weights rather than the arithmetic of one device.

    Args:
        path: the run folder.
        run: its settings, with overrides of ``merge``.

    Raises:
        RunError: the run is not trained, or the chosen merge fails ``merge.max_kl`` or
            ``merge.min_top1``; in that case nothing is kept.
    """
    trained_run = read_trained_run(path, run)
    measured = MeasuredRun.of(trained_run, run.merge.rows)
    updates = read_updates(trained_run.folder.adapter)
    base, folder = trained_run.base, trained_run.folder
    stored = stored_dtype(base)
    dtype = DTYPES[run.merge.dtype] if run.merge.dtype != "auto" else stored
    loaded = trained_run.load_base()
    arithmetic = measuring_compute(num_parameters(loaded.model))
    model, reference = measured.reference(loaded, arithmetic)
    trained = Trained(measured, reference, arithmetic)
    candidates = []
    try:
        if run.model.precision not in DTYPES:
            tensors = merged_tensors(loaded.model, updates, dtype)
            candidates.append(_candidate(trained, DEQUANTISED, loaded.model, tensors, dtype))
            del tensors
        del model, loaded
        gc.collect()
        as_stored = Compute(torch.device("cpu"), stored, "as stored")
        full = load_model(base, NAMES[stored], compute=as_stored)
        tensors = merged_tensors(full.model, updates, dtype)
        candidates.append(_candidate(trained, FULL, full.model, tensors, dtype))
        del full, tensors
        gc.collect()
        kept = _choose(candidates, run)
        report = _report(trained, candidates, kept)
        report.write(kept.folder / MERGE_REPORT)
        card = model_card(trained_run.manifest, report, run)
        write_text(kept.folder / "README.md", card)
        replace_folder(kept.folder, folder.merged)
    finally:
        for name in (FULL, DEQUANTISED):
            shutil.rmtree(_scratch(folder, name), ignore_errors=True)
    return report


def _candidate(
    trained: Trained,
    base: str,
    model: PreTrainedModel,
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
) -> Candidate:
    """Write the merged tensors of ``model``, reload them from disk, and measure them."""
    from transformers import GenerationConfig

    measured, renderer = trained.measured, trained.measured.trained.renderer
    folder = _scratch(measured.trained.folder, base)
    shutil.rmtree(folder, ignore_errors=True)
    num_bytes = write_shards(folder, tensors)
    config: Any = model.config
    plain = config.__class__.from_dict(
        {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    )
    plain.dtype = dtype
    plain.architectures = [type(model).__name__]
    plain.save_pretrained(folder)
    settings = GenerationConfig(
        bos_token_id=renderer.tokenizer.bos_token_id,
        eos_token_id=renderer.stop_ids,
        pad_token_id=renderer.pad_id,
    )
    settings.save_pretrained(folder)
    save_tokenizer(renderer.tokenizer, folder)
    arithmetic = trained.arithmetic
    reloaded = load_model(resolve_base(str(folder)), arithmetic.name, compute=arithmetic)
    predict = torch_predict(reloaded.model, measured.pad_id)
    close = fidelity(predict, measured.rows, trained.reference)
    figures = {"base": base, "dtype": NAMES[dtype], "weights_bytes": num_bytes, **close.as_json()}
    return Candidate(folder, MeasuredMerge.model_validate(figures))


def _choose(candidates: list[Candidate], run: Run) -> Candidate:
    """Return the candidate that the config selects, if it is close enough to the trained model."""
    wanted = run.merge.base
    named = {candidate.measured.base: candidate for candidate in candidates}
    if wanted == "closer":
        kept = min(candidates, key=lambda candidate: candidate.measured.kl_nats_per_token)
    elif wanted in named:
        kept = named[wanted]
    else:
        raise RunError(
            f"merge.base is {wanted}, but the run trained on an unquantised {run.model.precision} base;"
            " use full or closer"
        )
    close = kept.measured
    if close.kl_nats_per_token > run.merge.max_kl or close.top1_agreement < run.merge.min_top1:
        figures = "; ".join(
            f"{c.base} base in {c.dtype}: KL {c.kl_nats_per_token:.2e} nats/token, top-1"
            f" {c.top1_agreement:.2%}"
            for c in (candidate.measured for candidate in candidates)
        )
        raise RunError(
            f"the merged model is not the trained one: {figures}; allowed: KL {run.merge.max_kl:g},"
            f" top-1 {run.merge.min_top1:.0%}. Nothing was kept. Use merge.base=closer or"
            " merge.dtype=fp32, or accept it with merge.max_kl and merge.min_top1"
        )
    return kept


def _report(trained: Trained, candidates: list[Candidate], kept: Candidate) -> MergeReport:
    measured, run = trained.measured, trained.measured.trained.run
    base, reference, arithmetic = measured.trained.base, trained.reference, trained.arithmetic
    sha256 = digests(kept.folder)
    weights = {name for name in sha256 if name.endswith(".safetensors")}
    return MergeReport(
        run=str(run.name),
        base=base.identity,
        requested=run.merge.base,
        kept=kept.measured,
        candidates=[candidate.measured for candidate in candidates],
        trained=TrainedModel(precision=run.model.precision, loss=reference.loss),
        grids=grids_of(Path(base.path), run.model.precision, kept.measured.base),
        measured=Measurement(
            rows=len(measured.rows),
            positions=len(reference.log_probs),
            arithmetic=f"{arithmetic.name} on {arithmetic.device}",
            reloaded_from_disk=True,
        ),
        limits={"max_kl": run.merge.max_kl, "min_top1": run.merge.min_top1},
        sha256={name: sha256[name] for name in sorted(weights)},
        other_sha256={name: sha256[name] for name in sorted(sha256.keys() - weights)},
        **provenance(),
    )


def _scratch(folder: RunDir, base: str) -> Path:
    return folder.path / f".merging-{base}"
