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
from halfbyte.config.schema import Baseline, Precision
from halfbyte.data.questions import Question, fewshot_examples, held_out_rows, questions
from halfbyte.data.render import Renderer
from halfbyte.data.rows import Row
from halfbyte.errors import RunError
from halfbyte.eval.intervals import mean_interval, ratio_interval
from halfbyte.eval.metrics import scorer
from halfbyte.model.activations import USABLE_FRAC, free_bytes
from halfbyte.model.adapter import load_adapter
from halfbyte.model.footprint import weights_bytes
from halfbyte.model.generate import generate
from halfbyte.model.load import Loaded, load_model, load_tokenizer
from halfbyte.model.loss import add_token_loss, row_losses
from halfbyte.model.precision import DTYPES, Compute
from halfbyte.model.resolve import Base, fp32_bytes, resolve_base
from halfbyte.model.trained import same_compute, saved_renderer, trained_base
from halfbyte.run_dir import RunDir, read_json

if TYPE_CHECKING:
    from torch import nn

BASE_FULL, FEWSHOT, BASE_NF4 = "base-full", "base-full-fewshot", "base-nf4"
ADAPTER, MERGED = "adapter", "merged"
LOSS_METRIC = "held_out_loss"


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
    losses: list[tuple[float, int]] = field(default_factory=list)  # nats and tokens of each row
    weights_bytes: int = 0
    tokens_per_s: float = 0.0
    seconds: float = 0.0

    def loss_columns(self) -> tuple[list[float], list[int]]:
        """Summed losses and token counts of the rows."""
        return [loss for loss, _ in self.losses], [count for _, count in self.losses]

    def as_json(self, run: Run) -> dict[str, Any]:
        """The variant's entry in report.json."""
        settings = run.eval
        estimates = {
            metric: mean_interval(
                scores, settings.confidence, settings.resamples, run.seed
            ).as_json()
            for metric, scores in self.scores.items()
        }
        loss = ratio_interval(
            *self.loss_columns(), settings.confidence, settings.resamples, run.seed
        )
        reasons = {reason: self.finish_reasons.count(reason) for reason in ("stop", "length")}
        return {
            "name": self.name,
            "what": self.what,
            **estimates,
            "held_out_loss": loss.value,
            "held_out_loss_interval": loss.as_json(),
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
    check_answers(rows, run)
    asked = questions(rows, renderer)
    if FEWSHOT in wanted:
        fewshot_examples(folder, run.eval.fewshot, run.seed)
    for baseline in run.eval.baselines:
        resolve_base(baseline.model, baseline.revision)
    compute = same_compute(folder)

    found = {}
    for contender in _contenders(folder, run, base, compute, asked, renderer):
        found[contender.name] = measure(contender, run)
        # The next model is loaded only when nothing holds this one any more.
        del contender
    order = [*wanted, *(baseline.name for baseline in run.eval.baselines)]
    return [found[name] for name in order]


def check_answers(rows: list[Row], run: Run) -> None:
    """Whether the metrics can score these rows, before any model is loaded.

    Raises:
        RunError: raw text is to be scored by its answers, or no answer could ever be right.
        UserError: a metric needs a library that is not installed.
    """
    metrics = [metric for metric in run.eval.metrics if metric != LOSS_METRIC]
    if any(row.text is not None for row in rows):
        if metrics or FEWSHOT in run.eval.variants:
            raise RunError(
                "the run's rows are raw text, which has no answers to score: use"
                f" eval.metrics=[{LOSS_METRIC}] and leave {FEWSHOT} out of eval.variants, such as"
                f" eval.variants=[{BASE_FULL},{BASE_NF4},{ADAPTER},{MERGED}]"
            )
        return
    for metric in metrics:
        score = scorer(metric, run.eval.answer_pattern)
        for row in rows:
            if metric in ("exact_match", "field_match") and score(row.answer, row.answer) != 1:
                what = (
                    f"matches eval.answer_pattern {run.eval.answer_pattern!r} nowhere"
                    if metric == "exact_match"
                    else "is no JSON object"
                )
                raise RunError(
                    f"{row.place}: the wanted answer {row.answer[:60]!r} {what}, so that {metric} could"
                    " never count it as right; change eval.metrics or eval.answer_pattern"
                )


def measure(contender: Contender, run: Run) -> Variant:
    """Answers, scores, held-out loss and speed of one model on its questions."""
    variant = Variant(contender.name, contender.what, weights_bytes=contender.num_bytes)
    asked, renderer = contender.asked, contender.renderer
    start = time.perf_counter()
    if not any(question.row.text for question in asked):
        _answer(variant, contender, run)
    rows = [(question.ids, question.labels) for question in asked]
    variant.losses = row_losses(
        contender.model, rows, renderer.pad_id, max(1, run.eval.batch_size // 4)
    )
    variant.seconds = time.perf_counter() - start
    return variant


def _answer(variant: Variant, contender: Contender, run: Run) -> None:
    """Let the model answer every question, and score the answers."""
    asked, renderer = contender.asked, contender.renderer
    start = time.perf_counter()
    made = generate(
        contender.model,
        [question.prompt for question in asked],
        stop_ids=renderer.stop_ids,
        pad_id=renderer.pad_id,
        max_new_tokens=run.eval.max_new_tokens,
        batch_rows=run.eval.batch_size,
        progress=_progress(contender.name, len(asked)),
    )
    num_tokens = sum(len(answer.ids) + (answer.finish_reason == "stop") for answer in made)
    variant.tokens_per_s = num_tokens / (time.perf_counter() - start)
    variant.answers = [renderer.decode(answer.ids) for answer in made]
    variant.finish_reasons = [answer.finish_reason for answer in made]
    for metric in run.eval.metrics:
        if metric == LOSS_METRIC:
            continue
        score = scorer(metric, run.eval.answer_pattern)
        variant.scores[metric] = [
            score(answer, question.row.answer)
            for answer, question in zip(variant.answers, asked, strict=True)
        ]


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
        yield from _merged(folder, run, compute, asked, renderer)
        _release()
    for baseline in run.eval.baselines:
        yield from _baseline(baseline, run, compute, asked)
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
    loaded = _load_full(base, run, compute)
    size = weights_bytes(loaded.model)
    what = f"{base.name} in {loaded.precision}"
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
    same_weights = run.model.precision == "nf4"
    if ADAPTER in run.eval.variants or same_weights:
        loaded = _load(base, run.model.precision, compute, run)
        base_bytes = weights_bytes(loaded.model)
        model = load_adapter(loaded, folder.adapter)
        what = f"{base.name} in {run.model.precision}"
        if ADAPTER in run.eval.variants:
            adapted = f"{what} with the trained adapter"
            yield Contender(ADAPTER, adapted, model, weights_bytes(model), asked, renderer)
        if same_weights and BASE_NF4 in run.eval.variants:
            with model.disable_adapter():
                disabled = f"{what}, adapter disabled"
                yield Contender(BASE_NF4, disabled, model, base_bytes, asked, renderer)
        del model, loaded
        _release()
    if BASE_NF4 in run.eval.variants and not same_weights:
        loaded = _load(base, "nf4", compute, run)
        size = weights_bytes(loaded.model)
        yield Contender(BASE_NF4, f"{base.name} in nf4", loaded.model, size, asked, renderer)


def _merged(
    folder: RunDir, run: Run, compute: Compute, asked: list[Question], renderer: Renderer
) -> Iterator[Contender]:
    """The merged model, computed in a dtype that holds its stored weights exactly."""
    kept = read_json(folder.merged / "merge_report.json")["kept"]
    if kept["dtype"] != compute.name:
        compute = Compute(compute.device, torch.float32, "holds the stored weights exactly")
    loaded = _load_full(resolve_base(str(folder.merged)), run, compute)
    stored = f"stored in {kept['dtype']}, computed in {loaded.precision}"
    what = f"merged into the {kept['base']} base, {stored}"
    yield Contender(MERGED, what, loaded.model, kept["weights_bytes"], asked, renderer)


def _baseline(
    baseline: Baseline, run: Run, compute: Compute, asked: list[Question]
) -> Iterator[Contender]:
    """A further model with its own tokenizer and chat template."""
    base = resolve_base(baseline.model, baseline.revision)
    precision = baseline.precision or compute.name
    loaded = _load(base, precision, compute, run)
    own = Renderer(load_tokenizer(base), None, run.data.loss_on)
    own_asked = questions([question.row for question in asked], own)
    what = f"{base.name} in {precision}"
    yield Contender(baseline.name, what, loaded.model, weights_bytes(loaded.model), own_asked, own)


def _load_full(base: Base, run: Run, compute: Compute) -> Loaded:
    """Unquantised in the run's compute dtype, or in bf16 where fp32 would not fit."""
    precision: Precision = compute.name
    if precision == "fp32" and fp32_bytes(base) > USABLE_FRAC * free_bytes(compute.device):
        precision = "bf16"
        print(
            f"{base.name}: fp32 does not fit in the free memory; compared in bf16", file=sys.stderr
        )
    return _load(base, precision, compute, run)


def _load(base: Base, precision: Precision, compute: Compute, run: Run) -> Loaded:
    if precision in DTYPES:
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


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _progress(name: str, total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} rows", end=end, file=sys.stderr, flush=True)

    return show
