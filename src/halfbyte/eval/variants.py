"""Owns the variants: it loads the model of each variant name, with one set of weights in memory at a time."""

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
from halfbyte.data.chat_template import load_template
from halfbyte.data.questions import Question, fewshot_examples, questions
from halfbyte.data.render import Renderer
from halfbyte.eval.base_opponents import BaseOpponent
from halfbyte.forward.fuse import fuse_frozen
from halfbyte.forward.packed import add_token_loss
from halfbyte.host import USABLE_FRAC, free_bytes
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.adapter import load_adapter
from halfbyte.model.footprint import weights_bytes
from halfbyte.model.load import Loaded, load_config, load_model, stored_method
from halfbyte.model.merged import MERGE_REPORT, MergeReport, keeps_training
from halfbyte.model.precision import DTYPES, Compute
from halfbyte.model.resolve import Base, fp32_bytes, resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.trained.artefact import read_artefact
from halfbyte.trained.run import TrainedRun

BASE_FULL, FEWSHOT, BASE_NF4 = "base-full", "base-full-fewshot", "base-nf4"
ADAPTER, MERGED = "adapter", "merged"
TRAINED = (ADAPTER, MERGED)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def trained_name(names: Collection[str]) -> str | None:
    """Return the variant that the verdict is about: the adapter, else the merged model, else None."""
    return next((name for name in TRAINED if name in names), None)


@dataclass(frozen=True)
class Contender:
    """A model in memory with the questions that it answers.

    Attributes:
        num_bytes: size of the weights in memory.
        stored: files and folders that the weights were loaded from.
        opponent: the way to ask the base, if it is one of the opponents.
    """

    name: str
    what: str
    model: nn.Module | GgufModel
    num_bytes: int
    questions: list[Question]
    renderer: Renderer
    stored: tuple[Path, ...] = ()
    opponent: BaseOpponent | None = None

    @property
    def disk_bytes(self) -> int:
        """The size of the model's weights on disk, in bytes."""
        return sum(_stored_bytes(path) for path in self.stored)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        if isinstance(self.model, GgufModel):
            return torch.device("cuda" if self.model.gpu_layers else "cpu")
        return next(self.model.parameters()).device


def _stored_bytes(path: Path) -> int:
    """Return the bytes of a file, or of a folder's weights in the first format found, as in loading."""
    if path.is_file():
        return path.stat().st_size
    for suffix in WEIGHT_SUFFIXES:
        sizes = [file.stat().st_size for file in path.glob(f"*{suffix}")]
        if sizes:
            return sum(sizes)
    return 0


@dataclass(frozen=True)
class Comparison:
    """A trained run, the questions that its variants answer, the dtype that they compute in, and opponents."""

    trained: TrainedRun
    compute: Compute
    questions: list[Question]
    opponents: tuple[BaseOpponent, ...] = ()

    @property
    def run(self) -> Run:
        """The run's settings."""
        return self.trained.run


def contenders(comparison: Comparison) -> Iterator[Contender]:
    """Yield the variants of the config, loaded one after the other."""
    variants = set(comparison.run.eval.variants)
    if variants & {BASE_FULL, FEWSHOT} or comparison.opponents:
        yield from _full_size(comparison)
        release()
    if variants & {BASE_NF4, ADAPTER}:
        yield from _quantised(comparison)
        release()
    if MERGED in variants:
        yield _merged(comparison)
        release()
    for name in comparison.run.eval.variants:
        if is_artefact(name):
            yield from _artefact(comparison, name)
            release()
    for baseline in comparison.run.eval.baselines:
        yield from _baseline(comparison, baseline)
        release()


def asks_base(run: Run) -> bool:
    """Return whether the opponents with the base take part in a comparison."""
    named = run.eval.opponents is not None
    return named or bool({BASE_FULL, FEWSHOT} & {*run.eval.variants})


def base_side(comparison: Comparison) -> tuple[Base, Renderer, list[Question]]:
    """Return the base as it was published, which reads new tokens as text, its renderer and its questions."""
    run, trained = comparison.run, comparison.trained
    if not trained.base.new_tokens:
        return trained.base, trained.renderer, comparison.questions
    base, tokenizer = trained.base.plain, trained.renderer.tokenizer
    is_new = (
        tokenizer.convert_ids_to_tokens(trained.renderer.stop_id or 0) in trained.base.new_tokens
    )
    stop = "eos" if is_new else run.data.stop
    renderer = _own_renderer(base, tokenizer.chat_template, run, stop)
    rows = [question.row for question in comparison.questions]
    return base, renderer, questions(rows, renderer)


def _own_renderer(base: Base, template: str | None, run: Run, stop: str = "template") -> Renderer:
    """Return the renderer of a base's own tokenizer, with the run's settings of rows."""
    return Renderer(
        load_tokenizer(base),
        template,
        run.data.loss_on,
        stop=stop,
        system_as=run.data.system_as,
        day=run.data.date,
    )


def _full_size(comparison: Comparison) -> Iterator[Contender]:
    """Yield the base without quantisation, without and with examples in the prompt, and with other prompts."""
    run = comparison.run
    base, renderer, plain = base_side(comparison)
    loaded = _load_full(base, run, comparison.compute)
    size, stored = weights_bytes(loaded.model), (Path(base.path),)
    what = f"{base.name} in {loaded.precision}"
    if BASE_FULL in run.eval.variants:
        yield Contender(BASE_FULL, what, loaded.model, size, plain, renderer, stored)
    if FEWSHOT in run.eval.variants:
        examples = fewshot_examples(comparison.trained.folder, run.eval.fewshot, run.seed)
        longer = questions([question.row for question in comparison.questions], renderer, examples)
        shown = f"{what}, {run.eval.fewshot} training examples in the prompt"
        yield Contender(FEWSHOT, shown, loaded.model, size, longer, renderer, stored)
    for one in comparison.opponents:
        opponent = f"{what}, {one.what}"
        yield Contender(
            one.name, opponent, loaded.model, size, one.questions, renderer, stored, one
        )


def _quantised(comparison: Comparison) -> Iterator[Contender]:
    """Yield the adapter on its base, and the 4-bit base: the same weights with the adapter disabled."""
    trained, run, compute = comparison.trained, comparison.run, comparison.compute
    base, renderer, plain = trained.base, trained.renderer, comparison.questions
    same_weights = run.model.precision == "nf4" and not base.new_tokens
    stored = (Path(base.path),)
    if ADAPTER in run.eval.variants or same_weights:
        loaded = load_scored(base, run.model.precision, compute, run)
        base_bytes = weights_bytes(loaded.model)
        model = load_adapter(loaded, trained.folder.adapter)
        what = f"{base.name} in {run.model.precision}"
        if ADAPTER in run.eval.variants:
            adapted = f"{what} with the trained adapter"
            both = (*stored, trained.folder.adapter)
            yield Contender(ADAPTER, adapted, model, weights_bytes(model), plain, renderer, both)
        if same_weights and BASE_NF4 in run.eval.variants:
            with model.disable_adapter():
                disabled = f"{what}, adapter disabled"
                yield Contender(BASE_NF4, disabled, model, base_bytes, plain, renderer, stored)
        del model, loaded
        release()
    if BASE_NF4 in run.eval.variants and not same_weights:
        base, renderer, plain = base_side(comparison)
        loaded = load_scored(base, "nf4", compute, run)
        what = f"{base.name} in nf4{taken_back(base, 'nf4')}"
        size = weights_bytes(loaded.model)
        yield Contender(BASE_NF4, what, loaded.model, size, plain, renderer, stored)


def _merged(comparison: Comparison) -> Contender:
    """Load the merged model, in a compute dtype that holds its stored weights exactly."""
    folder, compute = comparison.trained.folder.merged, comparison.compute
    kept = MergeReport.read(folder / MERGE_REPORT).kept  # compare() has checked its files
    if kept.dtype != compute.name:
        compute = Compute(compute.device, torch.float32, "holds the stored weights exactly")
    loaded = _load_full(resolve_base(str(folder)), comparison.run, compute)
    what = (
        f"merged into the {kept.base} base, stored in {kept.dtype}, computed in {loaded.precision}"
    )
    renderer = comparison.trained.renderer
    size, plain = kept.weights_bytes, comparison.questions
    return Contender(MERGED, what, loaded.model, size, plain, renderer, (folder,))


def taken_back(base: Base, precision: Precision | None) -> str:
    """Return a note about a merged base whose training is undone by rounding to ``precision``, or ""."""
    if precision is None or keeps_training(Path(base.path), precision):
        return ""
    return ", which takes back the training that was merged into it"


def is_artefact(variant: str) -> bool:
    """Return whether a variant is an artefact made by halfbyte export."""
    return variant.startswith(("gguf-", "awq"))


def is_trained(variant: str) -> bool:
    """Return whether a variant holds what the run trained."""
    return variant in TRAINED or is_artefact(variant)


def _artefact(comparison: Comparison, name: str) -> Iterator[Contender]:
    """Yield an exported model, loaded in the engine that serves it."""
    trained, plain = comparison.trained, comparison.questions
    report = read_artefact(trained.folder, name)
    folder = trained.folder.export / name
    if name.startswith("gguf-"):
        (path,) = folder.glob("*.gguf")
        with in_llama_cpp(name, path, plain, trained.renderer) as contender:
            yield contender
        return
    compute = comparison.compute
    loaded = load_scored(resolve_base(str(folder)), None, compute, comparison.run)
    what = f"{report.method['library']}, computed in {compute.name}"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    yield Contender(name, what, loaded.model, size, plain, trained.renderer, (folder,))


def _baseline(comparison: Comparison, baseline: Baseline) -> Iterator[Contender]:
    """Yield a further model with its own tokenizer and chat template."""
    run, compute = comparison.run, comparison.compute
    base = resolve_base(baseline.model, baseline.revision)
    template = load_template(baseline.chat_template) if baseline.chat_template else None
    renderer = _own_renderer(base, template, run)
    shown = fewshot_examples(comparison.trained.folder, baseline.fewshot, run.seed)
    rendered = questions([question.row for question in comparison.questions], renderer, shown)
    note = f", {baseline.fewshot} training examples in the prompt" if shown else ""
    if baseline.engine == "llama.cpp":
        path, layers = Path(baseline.model), baseline.gpu_layers
        with in_llama_cpp(baseline.name, path, rendered, renderer, note, layers) as contender:
            yield contender
        return
    precision = baseline.precision
    stored = stored_method(load_config(base))
    if precision is None and stored is None:
        precision = compute.name
    loaded = load_scored(base, precision, compute, run)
    what = f"{base.name} in {precision or stored}{taken_back(base, precision)}{note}"
    size, files = weights_bytes(loaded.model), (Path(base.path),)
    yield Contender(baseline.name, what, loaded.model, size, rendered, renderer, files)


@contextmanager
def in_llama_cpp(
    name: str,
    path: Path,
    questions: list[Question],
    renderer: Renderer,
    note: str = "",
    gpu_layers: int = 0,
) -> Iterator[Contender]:
    """Open a GGUF file as a contender, counting its size as its memory; ``note`` goes into the report."""
    with GgufModel(path, gpu_layers=gpu_layers) as model:
        what = f"{path.name} in llama.cpp{note}"
        yield Contender(name, what, model, path.stat().st_size, questions, renderer, (path,))


def _load_full(base: Base, run: Run, compute: Compute) -> Loaded:
    """Load the base unquantised in the run's compute dtype, or in bf16 if fp32 would not fit."""
    precision: Precision = compute.name
    if precision == "fp32" and fp32_bytes(Path(base.path)) > USABLE_FRAC * free_bytes(
        compute.device
    ):
        precision = "bf16"
        print(
            f"{base.name}: fp32 does not fit in the free memory; compared in bf16", file=sys.stderr
        )
    return load_scored(base, precision, compute, run)


def load_scored(base: Base, precision: Precision | None, compute: Compute, run: Run) -> Loaded:
    """Load a model with ``token_loss``; if the precision is a dtype, the model computes in it."""
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
    fuse_frozen(loaded.model, compute.device)
    return loaded


def release() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
