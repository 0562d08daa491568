"""Owns the export: it checks, makes artefacts in a scratch folder, proves them, and only then names them."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.config import Run
from halfbyte.errors import RunError, UserError
from halfbyte.host import free_bytes, gib
from halfbyte.llamacpp.model import GgufModel
from halfbyte.llamacpp.tools import converter, library_path
from halfbyte.model.adapter import load_adapter
from halfbyte.model.footprint import num_parameters
from halfbyte.model.load import load_model
from halfbyte.model.precision import default_device
from halfbyte.model.resolve import fp32_bytes, resolve_base
from halfbyte.run_dir import RunDir, file_sha256, provenance, replace_folder
from halfbyte.ship.awq import FolderModel, awq_packages, make_awq
from halfbyte.ship.export_report import write_table
from halfbyte.ship.gguf import LOSSLESS, QUANTS, GgufFactory, make_adapter_gguf
from halfbyte.ship.integrity import check_adapter, check_merged
from halfbyte.ship.measured_run import MeasuredRun, measuring_compute
from halfbyte.ship.peft_folder import make_peft_folder
from halfbyte.ship.proof import EngineModel, Exam, Proof, References, prove, refuse_unproven
from halfbyte.trained.artefact import REPORT, ExportReport
from halfbyte.trained.fidelity import fidelity, reference, torch_predict
from halfbyte.trained.run import read_trained_run

SPARE = 1.1  # factor on the disk space that an export needs
ADAPTERS = ("adapter", "gguf-lora")  # of what is exported, what has no base in it
SIZES = {"f32": 1.0, "f16": 0.5, "bf16": 0.5, "q8_0": 0.28}  # vs fp32; others at most q8_0's


@dataclass(frozen=True)
class ExportTarget:
    """An artefact to make: ``gguf`` with a type, ``gguf-lora``, ``awq`` or ``adapter``."""

    kind: str
    quant: str = ""

    @property
    def name(self) -> str:
        """The name of the artefact's folder, and of the variant in a comparison."""
        return f"{self.kind}-{self.quant}" if self.quant else self.kind

    @property
    def lossless(self) -> bool:
        """Whether the artefact's weights keep 16 or 32 bits."""
        return self.kind != "awq" and (not self.quant or self.quant in LOSSLESS)


def export(
    path: Path,
    run: Run,
    targets: list[ExportTarget],
    examine: Callable[[MeasuredRun], Exam | None],
) -> list[ExportReport]:
    """Make and prove each artefact; return the contents of their export_report.json files.

    An artefact that fails its proof leaves nothing under its final name, and an older artefact of that
    name is kept.

    Args:
        path: the run folder.
        run: its settings, with overrides of ``export``.
        targets: the artefacts to make.
        examine: returns the questions that each artefact answers, if the rows have answers.

    Raises:
        RunError: the run is not trained or merged, is damaged, or an artefact fails its proof.
        ModelError: a tool is missing or does not support the architecture.
    """
    trained = read_trained_run(path, run)
    folder = trained.folder
    if any(target.kind in ADAPTERS for target in targets):
        trained.check_stands_alone()
    check_tools(targets)
    measured = MeasuredRun.of(trained, run.export.rows)
    check_adapter(trained)
    check_merged(trained)
    check_room(folder, targets)
    exam = examine(measured)
    references = _references(measured)
    reports = []
    scratch = folder.path / ".exporting"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        factory = GgufFactory(measured, scratch)
        for target in targets:
            print(f"{target.name}: making it", file=sys.stderr)
            partial = scratch / target.name
            partial.mkdir()
            method, opened = _make(target, measured, factory, partial)
            print(f"{target.name}: comparing it with the trained model", file=sys.stderr)
            theirs = references
            if target.kind == "gguf-lora":
                theirs = _references_on_full_base(measured, references)
            with opened() as engine:
                proof = prove(measured, engine, theirs, exam)
            gc.collect()
            refuse_unproven(target.name, proof, run.export, lossless=target.lossless)
            report = _report(measured, target, partial, method, proof, references)
            report.write(partial / REPORT)
            replace_folder(partial, folder.export / target.name)
            write_table(folder.export)
            reports.append(report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return reports


def check_quants(quants: list[str]) -> None:
    """Check that each name is a GGUF type that can be made.

    Raises:
        UserError: a name is not one of these types.
    """
    unknown = [quant for quant in quants if quant not in QUANTS]
    if unknown:
        raise UserError(f"--quant {' '.join(unknown)}: allowed are {', '.join(QUANTS)}")


def check_tools(targets: list[ExportTarget]) -> None:
    """Check that the programs which make the artefacts are there.

    Raises:
        ModelError: one is not; the message says how to get it.
    """
    kinds = {target.kind for target in targets}
    if kinds & {"gguf", "gguf-lora"}:
        converter()
        library_path()
    if "awq" in kinds:
        awq_packages()


def check_room(folder: RunDir, targets: list[ExportTarget]) -> None:
    """Check that disk and memory have room for the artefacts, before any is made.

    Raises:
        RunError: there is too little room; the message says how much is free and how much is needed.
    """
    whole = fp32_bytes(folder.merged)
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


def _share(target: ExportTarget) -> float:
    if target.kind in ("adapter",):
        return 0.1
    if target.kind == "gguf-lora":
        return 0.6  # its base in 16 bits, for the proof
    return SIZES.get(target.quant, SIZES["q8_0"] if target.quant else 0.5)


def _references(measured: MeasuredRun) -> References:
    """Predict the rows with the trained and the merged model, one in memory at a time."""
    print("reading the trained and the merged model", file=sys.stderr)
    loaded = measured.trained.load_base()
    arithmetic = measuring_compute(num_parameters(loaded.model))
    trained = measured.reference(loaded, arithmetic)[1]
    del loaded
    gc.collect()
    base = resolve_base(str(measured.trained.folder.merged))
    model = load_model(base, arithmetic.name, compute=arithmetic).model
    predict = torch_predict(model, measured.pad_id)
    merged = reference(predict, measured.rows, int(model.config.vocab_size))
    return References(trained, merged, fidelity(predict, measured.rows, trained))


def _references_on_full_base(measured: MeasuredRun, references: References) -> References:
    """Predict the rows with the adapter on the unquantised base, as engines run an adapter alone."""
    trained = measured.trained
    arithmetic = measuring_compute(fp32_bytes(Path(trained.base.path)) // 4)
    loaded = load_model(trained.base, arithmetic.name, compute=arithmetic)
    model = load_adapter(loaded, trained.folder.adapter)
    vocabulary = int(loaded.model.config.vocab_size)
    full = reference(torch_predict(model, measured.pad_id), measured.rows, vocabulary)
    return replace(references, trained=full)


def _make(
    target: ExportTarget, measured: MeasuredRun, factory: GgufFactory, partial: Path
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Make an artefact; return how it was made, and a function that opens it in its engine."""
    trained = measured.trained
    if target.kind == "gguf":
        path, method = factory.make(target.quant, partial)
        return method, lambda: GgufModel(path)
    if target.kind == "gguf-lora":
        path = make_adapter_gguf(trained, partial)
        base = factory.base_file()
        method = {
            "measured_on": "the unquantised base in f16, against the adapter on that base in fp32"
        }
        return method, lambda: GgufModel(base, adapter=path)
    if target.kind == "awq":
        return make_awq(trained, partial), lambda: _in_transformers(partial, measured)
    return make_peft_folder(trained, partial), lambda: _on_its_base(partial, measured)


@contextmanager
def _in_transformers(folder: Path, measured: MeasuredRun) -> Iterator[EngineModel]:
    arithmetic = measuring_compute(fp32_bytes(Path(measured.trained.base.path)) // 4)
    loaded = load_model(resolve_base(str(folder)), None, compute=arithmetic)
    yield FolderModel(loaded.model, folder, measured)


@contextmanager
def _on_its_base(folder: Path, measured: MeasuredRun) -> Iterator[EngineModel]:
    loaded = measured.trained.load_base()
    yield FolderModel(load_adapter(loaded, folder), folder, measured)


def _report(
    measured: MeasuredRun,
    target: ExportTarget,
    partial: Path,
    method: dict[str, Any],
    proof: Proof,
    references: References,
) -> ExportReport:
    files = sorted(path for path in partial.iterdir() if path.is_file())
    merged = references.merged_fidelity
    content = {
        "run": measured.trained.run.name,
        "name": target.name,
        "kind": target.kind,
        "method": method,
        "num_bytes": sum(path.stat().st_size for path in files),
        "base": measured.trained.base.identity,
        "chat_template_sha256": measured.trained.renderer.template_sha256,
        "merged": {"perplexity": merged.perplexity, "against_trained": merged.as_json()},
        "rows": len(measured.rows),
        **proof.as_json(),
        "limits": measured.trained.run.export.model_dump(mode="json"),
        "sha256": {path.name: file_sha256(path) for path in files},
        **provenance(),
    }
    return ExportReport.model_validate(content)
