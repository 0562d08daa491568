"""Owns the export: checks, artefacts in a scratch folder, their proof, and only then their final name."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config import Run
from halfbyte.errors import RunError, UserError
from halfbyte.host import free_bytes, gib
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.adapter import load_adapter
from halfbyte.model.footprint import num_parameters
from halfbyte.model.load import load_model
from halfbyte.model.precision import default_device
from halfbyte.model.resolve import Base, fp32_bytes, resolve_base
from halfbyte.run_dir import RunDir, file_sha256, provenance, replace_folder, write_json
from halfbyte.ship.awq import ServedFolder, make_awq
from halfbyte.ship.export_report import write_table
from halfbyte.ship.gguf import LOSSLESS, QUANTS, GgufFactory, make_adapter_gguf
from halfbyte.ship.integrity import check_adapter, check_merged
from halfbyte.ship.peft_folder import make_peft_folder
from halfbyte.ship.proof import EngineModel, Exam, Proof, References, prove, refuse_unproven
from halfbyte.ship.work import Work, measuring
from halfbyte.trained.artefact import REPORT
from halfbyte.trained.fidelity import Reference, fidelity, reference, torch_predict

SPARE = 1.1  # of the disk that an export is known to need
SIZES = {"f32": 1.0, "f16": 0.5, "bf16": 0.5, "q8_0": 0.28}  # of fp32; other types at most q8_0's


@dataclass(frozen=True)
class Target:
    """What is asked for: ``gguf`` with a type, ``gguf-lora``, ``awq`` or ``adapter``."""

    kind: str
    quant: str = ""

    @property
    def name(self) -> str:
        """The artefact's folder, and its name as a variant in a comparison."""
        return f"{self.kind}-{self.quant}" if self.quant else self.kind

    @property
    def lossless(self) -> bool:
        """Whether its weights keep 16 or 32 bits."""
        return self.kind != "awq" and (not self.quant or self.quant in LOSSLESS)


def export(
    folder: RunDir, run: Run, targets: list[Target], examine: Callable[[Work], Exam | None]
) -> list[dict[str, Any]]:
    """Make and prove each artefact; returns the contents of their export_report.json.

    An artefact that is not the trained model leaves nothing under its final name, and an older one
    stays as it was.

    Raises:
        RunError: the run is not trained or merged, is damaged, or an artefact fails its proof.
        ModelError: a tool is missing or does not know the architecture.
    """
    work = Work(folder, run, run.export.rows)
    check_adapter(folder, work.base)
    check_merged(folder, work.base, work.renderer.template_sha256)
    check_room(folder, targets)
    exam = examine(work)
    told = _told(work)
    reports = []
    scratch = folder.path / ".exporting"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        factory = GgufFactory(work, scratch)
        for target in targets:
            print(f"{target.name}: making it", file=sys.stderr)
            partial = scratch / target.name
            partial.mkdir()
            made, opened = _make(target, work, factory, partial)
            print(f"{target.name}: comparing it with the trained model", file=sys.stderr)
            own = _told_on_full_base(work, told) if target.kind == "gguf-lora" else told
            with opened() as served:
                proof = prove(work, served, own, exam)
            gc.collect()
            refuse_unproven(target.name, proof, run.export, lossless=target.lossless)
            report = _report(work, target, partial, made, proof, told)
            write_json(partial / REPORT, report)
            replace_folder(partial, folder.export / target.name)
            write_table(folder.export)
            reports.append(report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return reports


def check_quants(quants: list[str]) -> None:
    """Whether each is a type of GGUF that can be made.

    Raises:
        UserError: one is not.
    """
    unknown = [quant for quant in quants if quant not in QUANTS]
    if unknown:
        raise UserError(f"--quant {' '.join(unknown)}: allowed are {', '.join(QUANTS)}")


def check_room(folder: RunDir, targets: list[Target]) -> None:
    """Whether disk and memory hold what is asked for, before any of it is made.

    Raises:
        RunError: too little; the message says how much is there and how much is needed.
    """
    whole = fp32_bytes(Base(str(folder.merged), str(folder.merged), None, "", ""))
    files = [_share(target) for target in targets]
    sources = [1.0 for target in targets if target.quant and target.quant not in SIZES][:1]
    needed = int(SPARE * whole * (sum(files) + sum(sources)))
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise RunError(
            f"{folder.path}: the disk has {gib(free)} free, and {', '.join(t.name for t in targets)} need"
            f" {gib(needed)} (with what they are made from). Make room, or export fewer at a time"
        )
    memory = free_bytes(default_device())
    largest = int(SPARE * whole * max(files))
    if largest > memory:
        raise RunError(
            f"{folder.path}: {gib(memory)} of memory are free, and the largest artefact needs"
            f" {gib(largest)} to be loaded and compared"
        )


def _share(target: Target) -> float:
    if target.kind in ("adapter",):
        return 0.1
    if target.kind == "gguf-lora":
        return 0.6  # its base in 16 bits, for the proof
    return SIZES.get(target.quant, SIZES["q8_0"] if target.quant else 0.5)


def _told(work: Work) -> References:
    """What the trained and the merged model predict, one in memory at a time."""
    print("reading the trained and the merged model", file=sys.stderr)
    loaded = work.load_base()
    arithmetic = measuring(num_parameters(loaded.model))
    trained = work.reference(loaded, arithmetic)[1]
    del loaded
    gc.collect()
    merged = load_model(
        resolve_base(str(work.folder.merged)), arithmetic.name, compute=arithmetic
    ).model
    predict = torch_predict(merged, work.pad_id)
    vocabulary = int(merged.config.vocab_size)
    told = reference(predict, work.rows, vocabulary)
    same = fidelity(predict, work.rows, trained)
    return References(trained, told, same)


def _told_on_full_base(work: Work, told: References) -> References:
    """For an adapter alone: what it predicts on the unquantised base, which engines put it on."""
    arithmetic = measuring(fp32_bytes(work.base) // 4)
    loaded = load_model(work.base, arithmetic.name, compute=arithmetic)
    model = load_adapter(loaded, work.folder.adapter)
    full: Reference = reference(
        torch_predict(model, work.pad_id), work.rows, int(loaded.model.config.vocab_size)
    )
    return References(full, told.merged, told.merged_as)


def _make(
    target: Target, work: Work, factory: GgufFactory, partial: Path
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Make an artefact; returns how, and what opens it in its engine."""
    if target.kind == "gguf":
        path, made = factory.make(target.quant, partial)
        return made, lambda: GgufModel(path)
    if target.kind == "gguf-lora":
        path = make_adapter_gguf(work, partial)
        base = factory.base_file()
        made = {
            "measured_on": "the unquantised base in f16, against the adapter on that base in fp32"
        }
        return made, lambda: GgufModel(base, adapter=path)
    if target.kind == "awq":
        return make_awq(work, partial), lambda: _in_transformers(partial, work)
    return make_peft_folder(work, partial), lambda: _on_its_base(partial, work)


@contextmanager
def _in_transformers(folder: Path, work: Work) -> Iterator[EngineModel]:
    arithmetic = measuring(fp32_bytes(work.base) // 4)
    loaded = load_model(resolve_base(str(folder)), None, compute=arithmetic)
    yield ServedFolder(loaded.model, folder, work)


@contextmanager
def _on_its_base(folder: Path, work: Work) -> Iterator[EngineModel]:
    loaded = work.load_base()
    model = load_adapter(loaded, folder)
    yield ServedFolder(model, folder, work)


def _report(
    work: Work, target: Target, partial: Path, made: dict[str, Any], proof: Proof, told: References
) -> dict[str, Any]:
    files = sorted(path for path in partial.iterdir() if path.is_file())
    return {
        "run": work.run.name,
        "name": target.name,
        "kind": target.kind,
        "made": made,
        "bytes": sum(path.stat().st_size for path in files),
        "base": work.base.as_json(),
        "chat_template_sha256": work.renderer.template_sha256,
        "merged": {
            "perplexity": told.merged_as.perplexity,
            "against_trained": told.merged_as.as_json(),
        },
        "rows": len(work.rows),
        **proof.as_json(),
        "limits": work.run.export.model_dump(mode="json"),
        "sha256": {path.name: file_sha256(path) for path in files},
        **provenance(),
    }
