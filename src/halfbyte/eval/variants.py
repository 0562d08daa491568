"""Owns the variants: which model answers under which name, one set of weights in memory at a time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halfbyte.config import Run
from halfbyte.config.evaluation import Baseline
from halfbyte.config.section import Precision
from halfbyte.data.questions import Question, fewshot_examples, questions
from halfbyte.data.render import Renderer, load_template
from halfbyte.forward.packed import add_token_loss
from halfbyte.host import USABLE_FRAC, free_bytes
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.adapter import load_adapter
from halfbyte.model.footprint import weights_bytes
from halfbyte.model.load import Loaded, load_config, load_model, load_tokenizer, stored_method
from halfbyte.model.merged import MERGE_REPORT, keeps_training
from halfbyte.model.precision import DTYPES, Compute
from halfbyte.model.resolve import Base, fp32_bytes, resolve_base
from halfbyte.run_dir import RunDir, read_json
from halfbyte.trained.artefact import read_artefact

BASE_FULL, FEWSHOT, BASE_NF4 = "base-full", "base-full-fewshot", "base-nf4"
ADAPTER, MERGED = "adapter", "merged"
TRAINED = (ADAPTER, MERGED)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def trained_name(names: Collection[str]) -> str | None:
    """The variant that a verdict is about: the adapter, else the merged model, else none."""
    return next((name for name in TRAINED if name in names), None)


@dataclass(frozen=True)
class Contender:
    """A model in memory with what it is asked.

    Attributes:
        num_bytes: of weights in memory.
        stored: files and folders that hold the weights it was loaded from.
    """

    name: str
    what: str
    model: nn.Module | GgufModel
    num_bytes: int
    asked: list[Question]
    renderer: Renderer
    stored: tuple[Path, ...] = ()

    @property
    def disk_bytes(self) -> int:
        """Of the weights on disk."""
        return sum(_stored_bytes(path) for path in self.stored)

    @property
    def device(self) -> torch.device:
        """That computes."""
        if isinstance(self.model, GgufModel):
            return torch.device("cuda" if self.model.gpu_layers else "cpu")
        return next(self.model.parameters()).device


def _stored_bytes(path: Path) -> int:
    """Of a file, or of a folder's weights: of the first of these kinds that it holds, as loading takes them."""
    if path.is_file():
        return path.stat().st_size
    for suffix in WEIGHT_SUFFIXES:
        sizes = [file.stat().st_size for file in path.glob(f"*{suffix}")]
        if sizes:
            return sum(sizes)
    return 0


@dataclass(frozen=True)
class Trained:
    """A trained run with what its variants are asked."""

    folder: RunDir
    run: Run
    base: Base
    compute: Compute
    asked: list[Question]
    renderer: Renderer


def contenders(trained: Trained) -> Iterator[Contender]:
    """Each variant that is asked for."""
    variants = set(trained.run.eval.variants)
    if variants & {BASE_FULL, FEWSHOT}:
        yield from _full_size(trained)
        release()
    if variants & {BASE_NF4, ADAPTER}:
        yield from _quantised(trained)
        release()
    if MERGED in variants:
        yield _merged(trained)
        release()
    for name in trained.run.eval.variants:
        if is_artefact(name):
            yield from _artefact(trained, name)
            release()
    for baseline in trained.run.eval.baselines:
        yield from _baseline(trained, baseline)
        release()


def _full_size(trained: Trained) -> Iterator[Contender]:
    """The base without quantisation, asked plainly and with examples in the prompt."""
    run, asked, renderer = trained.run, trained.asked, trained.renderer
    loaded = _load_full(trained.base, run, trained.compute)
    size, stored = weights_bytes(loaded.model), (Path(trained.base.path),)
    what = f"{trained.base.name} in {loaded.precision}"
    if BASE_FULL in run.eval.variants:
        yield Contender(BASE_FULL, what, loaded.model, size, asked, renderer, stored)
    if FEWSHOT in run.eval.variants:
        examples = fewshot_examples(trained.folder, run.eval.fewshot, run.seed)
        longer = questions([question.row for question in asked], renderer, examples)
        what = f"{what}, {run.eval.fewshot} training examples in the prompt"
        yield Contender(FEWSHOT, what, loaded.model, size, longer, renderer, stored)


def _quantised(trained: Trained) -> Iterator[Contender]:
    """The adapter on its base, and the 4-bit base: the same weights with the adapter disabled."""
    run, asked, renderer = trained.run, trained.asked, trained.renderer
    same_weights, stored = run.model.precision == "nf4", (Path(trained.base.path),)
    if ADAPTER in run.eval.variants or same_weights:
        loaded = load_scored(trained.base, run.model.precision, trained.compute, run)
        base_bytes = weights_bytes(loaded.model)
        model = load_adapter(loaded, trained.folder.adapter)
        what = f"{trained.base.name} in {run.model.precision}"
        if ADAPTER in run.eval.variants:
            adapted = f"{what} with the trained adapter"
            both = (*stored, trained.folder.adapter)
            yield Contender(ADAPTER, adapted, model, weights_bytes(model), asked, renderer, both)
        if same_weights and BASE_NF4 in run.eval.variants:
            with model.disable_adapter():
                disabled = f"{what}, adapter disabled"
                yield Contender(BASE_NF4, disabled, model, base_bytes, asked, renderer, stored)
        del model, loaded
        release()
    if BASE_NF4 in run.eval.variants and not same_weights:
        loaded = load_scored(trained.base, "nf4", trained.compute, run)
        what = f"{trained.base.name} in nf4{taken_back(trained.base, 'nf4')}"
        size = weights_bytes(loaded.model)
        yield Contender(BASE_NF4, what, loaded.model, size, asked, renderer, stored)


def _merged(trained: Trained) -> Contender:
    """The merged model, computed in a dtype that holds its stored weights exactly."""
    folder, compute = trained.folder.merged, trained.compute
    kept = read_json(folder / MERGE_REPORT)["kept"]
    if kept["dtype"] != compute.name:
        compute = Compute(compute.device, torch.float32, "holds the stored weights exactly")
    loaded = _load_full(resolve_base(str(folder)), trained.run, compute)
    stored = f"stored in {kept['dtype']}, computed in {loaded.precision}"
    what = f"merged into the {kept['base']} base, {stored}"
    size = int(kept["weights_bytes"])
    return Contender(MERGED, what, loaded.model, size, trained.asked, trained.renderer, (folder,))


def taken_back(base: Base, precision: Precision | None) -> str:
    """What is to be said of a merge that a precision rounds back to where it was before its training."""
    if precision is None or keeps_training(Path(base.path), precision):
        return ""
    return ", which takes back the training that was merged into it"


def is_artefact(variant: str) -> bool:
    """Whether a variant is one that train/export.py makes."""
    return variant.startswith(("gguf-", "awq"))


def _artefact(trained: Trained, name: str) -> Iterator[Contender]:
    """An exported model in the engine that serves it."""
    report = read_artefact(trained.folder, name)
    folder = trained.folder.export / name
    asked, renderer = trained.asked, trained.renderer
    if name.startswith("gguf-"):
        (path,) = folder.glob("*.gguf")
        with in_llama_cpp(name, path, asked, renderer) as contender:
            yield contender
        return
    loaded = load_scored(resolve_base(str(folder)), None, trained.compute, trained.run)
    what = f"{report['made']['library']}, computed in {trained.compute.name}"
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    yield Contender(name, what, loaded.model, stored, asked, renderer, (folder,))


def _baseline(trained: Trained, baseline: Baseline) -> Iterator[Contender]:
    """A further model with its own tokenizer and chat template."""
    base = resolve_base(baseline.model, baseline.revision)
    template = load_template(baseline.chat_template) if baseline.chat_template else None
    own = Renderer(load_tokenizer(base), template, trained.run.data.loss_on)
    shown = fewshot_examples(trained.folder, baseline.fewshot, trained.run.seed)
    asked = questions([question.row for question in trained.asked], own, shown)
    told = f", {baseline.fewshot} training examples in the prompt" if shown else ""
    if baseline.engine == "llama.cpp":
        path = Path(baseline.model)
        with in_llama_cpp(baseline.name, path, asked, own, told, baseline.gpu_layers) as contender:
            yield contender
        return
    precision = baseline.precision
    stored = stored_method(load_config(base))
    if precision is None and stored is None:
        precision = trained.compute.name
    loaded = load_scored(base, precision, trained.compute, trained.run)
    what = f"{base.name} in {precision or stored}{taken_back(base, precision)}{told}"
    size = weights_bytes(loaded.model)
    yield Contender(baseline.name, what, loaded.model, size, asked, own, (Path(base.path),))


@contextmanager
def in_llama_cpp(
    name: str,
    path: Path,
    asked: list[Question],
    renderer: Renderer,
    told: str = "",
    gpu_layers: int = 0,
) -> Iterator[Contender]:
    """A GGUF file as a contender; its memory is its size. ``told``: what else to say of it."""
    with GgufModel(path, gpu_layers=gpu_layers) as model:
        what = f"{path.name} in llama.cpp{told}"
        yield Contender(name, what, model, path.stat().st_size, asked, renderer, (path,))


def _load_full(base: Base, run: Run, compute: Compute) -> Loaded:
    """Unquantised in the run's compute dtype, or in bf16 where fp32 would not fit."""
    precision: Precision = compute.name
    if precision == "fp32" and fp32_bytes(base) > USABLE_FRAC * free_bytes(compute.device):
        precision = "bf16"
        print(
            f"{base.name}: fp32 does not fit in the free memory; compared in bf16", file=sys.stderr
        )
    return load_scored(base, precision, compute, run)


def load_scored(base: Base, precision: Precision | None, compute: Compute, run: Run) -> Loaded:
    """A model that knows ``token_loss``; where the precision is a dtype, it computes in that."""
    if precision is not None and precision in DTYPES:
        compute = Compute(compute.device, DTYPES[precision], compute.reason)
    loaded = load_model(
        base,
        precision,
        double_quant=run.model.double_quant,
        compute=compute,
        attention=run.model.attention,
    )
    add_token_loss(loaded.model)
    return loaded


def release() -> None:
    """Give back the memory of models that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
