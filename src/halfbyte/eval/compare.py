"""Owns the comparison: every variant on the same rows with the same renderer and greedy decoding."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.config import Run
from halfbyte.data.questions import Question, fewshot_examples, held_out_rows, questions
from halfbyte.data.render import Renderer
from halfbyte.eval.intervals import mean_interval
from halfbyte.eval.metrics import scorer
from halfbyte.model.adapter import load_adapter
from halfbyte.model.footprint import weights_bytes
from halfbyte.model.generate import generate
from halfbyte.model.load import Loaded, load_model, load_tokenizer
from halfbyte.model.loss import add_token_loss, summed_loss
from halfbyte.model.precision import DTYPES, Compute
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.model.trained import same_compute, saved_renderer, trained_base
from halfbyte.run_dir import RunDir, read_json

if TYPE_CHECKING:
    from torch import nn

BASE_FULL, FEWSHOT, BASE_NF4 = "base-full", "base-full-fewshot", "base-nf4"
ADAPTER, MERGED = "adapter", "merged"


@dataclass(frozen=True)
class Contender:
    """A model in memory with what it is asked; ``num_bytes`` of weights as loaded or as stored."""

    name: str
    what: str
    model: nn.Module
    num_bytes: int
    asked: list[Question]
    renderer: Renderer


@dataclass
class Variant:
    """What one variant answered and what that is worth."""

    name: str
    what: str
    answers: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    held_out_loss: float = 0.0
    weights_bytes: int = 0
    tokens_per_s: float = 0.0
    seconds: float = 0.0

    def as_json(self, run: Run) -> dict[str, Any]:
        """The variant's entry in report.json."""
        settings = run.eval
        estimates = {
            metric: mean_interval(
                scores, settings.confidence, settings.resamples, run.seed
            ).as_json()
            for metric, scores in self.scores.items()
        }
        reasons = {reason: self.finish_reasons.count(reason) for reason in ("stop", "length")}
        return {
            "name": self.name,
            "what": self.what,
            **estimates,
            "held_out_loss": self.held_out_loss,
            "weights_bytes": self.weights_bytes,
            "tokens_per_s": round(self.tokens_per_s, 2),
            "finish_reasons": reasons,
            "seconds": round(self.seconds, 1),
        }


def compare(folder: RunDir, run: Run) -> list[Variant]:
    """Measure every variant of ``eval.variants`` and ``eval.baselines``, in that order.

    Raises:
        RunError: the run is not trained, or not merged while ``merged`` is asked for.
    """
    folder.trained()
    wanted = list(run.eval.variants)
    if MERGED in wanted:
        folder.need(
            folder.merged / "merge_report.json",
            f"python train/merge.py {folder.path} (or leave it out with eval.variants)",
        )
    base = trained_base(folder, run)
    renderer = saved_renderer(folder, run, base)
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    asked = questions(rows, renderer)
    compute = same_compute(folder)

    found = {
        contender.name: measure(contender, run)
        for contender in _contenders(folder, run, base, compute, asked, renderer)
    }
    order = [*wanted, *(baseline.name for baseline in run.eval.baselines)]
    return [found[name] for name in order]


def measure(contender: Contender, run: Run) -> Variant:
    """Answers, scores, held-out loss and speed of one model on its questions."""
    variant = Variant(contender.name, contender.what, weights_bytes=contender.num_bytes)
    model, asked, renderer = contender.model, contender.asked, contender.renderer
    pad_id = renderer.pad_id
    start = time.perf_counter()
    made = generate(
        model,
        [question.prompt for question in asked],
        stop_ids=renderer.stop_ids,
        pad_id=pad_id,
        max_new_tokens=run.eval.max_new_tokens,
        batch_rows=run.eval.batch_size,
        progress=_progress(contender.name, len(asked)),
    )
    generating_s = time.perf_counter() - start
    variant.tokens_per_s = sum(len(answer.ids) + 1 for answer in made) / generating_s
    variant.answers = [renderer.decode(answer.ids) for answer in made]
    variant.finish_reasons = [answer.finish_reason for answer in made]
    for metric in run.eval.metrics:
        score = scorer(metric, run.eval.answer_pattern)
        variant.scores[metric] = [
            score(answer, question.row.answer)
            for answer, question in zip(variant.answers, asked, strict=True)
        ]
    rows = [(question.ids, question.labels) for question in asked]
    total, count = summed_loss(model, rows, pad_id, max(1, run.eval.batch_size // 4))
    variant.held_out_loss = total / count
    variant.seconds = time.perf_counter() - start
    return variant


def _contenders(
    folder: RunDir,
    run: Run,
    base: Base,
    compute: Compute,
    asked: list[Question],
    renderer: Renderer,
) -> Iterator[Contender]:
    """Each variant that is asked for; one set of weights in memory at a time."""
    wanted = set(run.eval.variants)
    if wanted & {BASE_FULL, FEWSHOT}:
        yield from _full_size(folder, run, base, compute, asked, renderer)
        _release()
    if wanted & {BASE_NF4, ADAPTER}:
        yield from _quantised(folder, run, base, compute, asked, renderer)
        _release()
    if MERGED in wanted:
        loaded = _load(resolve_base(str(folder.merged)), compute.name, compute)
        kept = read_json(folder.merged / "merge_report.json")["kept"]
        what = f"merged into the {kept['base']} base, stored in {kept['dtype']}"
        yield Contender(MERGED, what, loaded.model, kept["weights_bytes"], asked, renderer)
        del loaded
        _release()
    for baseline in run.eval.baselines:
        other = resolve_base(baseline.model, baseline.revision)
        loaded = _load(other, baseline.precision, None)
        own = Renderer(load_tokenizer(other), None, run.data.loss_on)
        own_asked = questions([question.row for question in asked], own)
        what = f"{other.name} in {baseline.precision}"
        size = weights_bytes(loaded.model)
        yield Contender(baseline.name, what, loaded.model, size, own_asked, own)
        del loaded
        _release()


def _full_size(
    folder: RunDir,
    run: Run,
    base: Base,
    compute: Compute,
    asked: list[Question],
    renderer: Renderer,
) -> Iterator[Contender]:
    """The base without quantisation, asked plainly and with examples in the prompt."""
    loaded = _load(base, compute.name, compute)
    size = weights_bytes(loaded.model)
    what = f"{base.name} in {compute.name}"
    if BASE_FULL in run.eval.variants:
        yield Contender(BASE_FULL, what, loaded.model, size, asked, renderer)
    if FEWSHOT in run.eval.variants:
        examples = fewshot_examples(folder, run.eval.fewshot, run.seed)
        longer = questions([question.row for question in asked], renderer, examples)
        what = f"{what}, {run.eval.fewshot} training examples in the prompt"
        yield Contender(FEWSHOT, what, loaded.model, size, longer, renderer)


def _quantised(
    folder: RunDir,
    run: Run,
    base: Base,
    compute: Compute,
    asked: list[Question],
    renderer: Renderer,
) -> Iterator[Contender]:
    """The adapter on its base, and the 4-bit base: the same weights with the adapter disabled."""
    loaded = _load(base, run.model.precision, compute, run.model.double_quant)
    base_bytes = weights_bytes(loaded.model)
    model = load_adapter(loaded, folder.adapter)
    what = f"{base.name} in {run.model.precision}"
    if ADAPTER in run.eval.variants:
        adapted = f"{what} with the trained adapter"
        yield Contender(ADAPTER, adapted, model, weights_bytes(model), asked, renderer)
    if BASE_NF4 not in run.eval.variants:
        return
    if run.model.precision == "nf4":
        with model.disable_adapter():
            disabled = f"{what}, adapter disabled"
            yield Contender(BASE_NF4, disabled, model, base_bytes, asked, renderer)
        return
    del model, loaded
    _release()
    loaded = _load(base, "nf4", compute, run.model.double_quant)
    size = weights_bytes(loaded.model)
    yield Contender(BASE_NF4, f"{base.name} in nf4", loaded.model, size, asked, renderer)


def _load(base: Base, precision: Any, compute: Compute | None, double_quant: bool = True) -> Loaded:
    if compute is not None and precision in DTYPES:
        compute = Compute(compute.device, DTYPES[precision], compute.reason)
    loaded = load_model(base, precision, double_quant=double_quant, compute=compute)
    add_token_loss(loaded.model)
    return loaded


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _progress(name: str, total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} rows", end=end, file=sys.stderr, flush=True)

    return show
