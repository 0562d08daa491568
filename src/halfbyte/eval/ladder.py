"""Owns the quantisation ladder: one model at every precision, with the memory and the quality of each."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.config import Run
from halfbyte.config.section import Precision
from halfbyte.data.prepare import prepare
from halfbyte.data.questions import Question, held_out_rows, questions
from halfbyte.data.render import Renderer, renderer_of
from halfbyte.errors import ConfigError, DataError
from halfbyte.eval.compare import check_answers
from halfbyte.eval.measure import Variant, measure
from halfbyte.eval.pages import interval, rate
from halfbyte.eval.variants import Contender, in_llama_cpp, is_artefact, load_scored, release
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.footprint import num_parameters, weights_bytes
from halfbyte.model.load import stored_method
from halfbyte.model.merged import merged_report
from halfbyte.model.precision import DTYPES, choose_compute
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.scoring.rows import LOSS_METRIC, with_tool_metrics
from halfbyte.trained.artefact import read_artefact
from halfbyte.trained.fidelity import (
    Fidelity,
    Reference,
    agreement,
    fidelity,
    reference,
    torch_predict,
)
from halfbyte.trained.run import read_trained_run

# Precision and double quantisation by name. The first rung measured is the reference of the others.
RUNGS: dict[str, tuple[Precision, bool]] = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp16": ("fp16", False),
    "int8": ("int8", False),
    "nf4": ("nf4", False),
    "nf4+dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4+dq": ("fp4", True),
}
DEFAULT_RUNGS = ("fp32", "bf16", "int8", "nf4", "nf4+dq", "fp4", "fp4+dq")


@dataclass(frozen=True)
class Rung:
    """One precision: its answers and speed, and how far it is from the full precision."""

    variant: Variant
    fidelity: Fidelity
    num_weights: int | None  # None: not counted (GGUF)

    def as_json(self, run: Run) -> dict[str, Any]:
        """Return the rung's entry in ladder.json."""
        return {
            **self.variant.as_json(run),
            "num_weights": self.num_weights,
            "perplexity": math.exp(self.fidelity.loss),
            "kl_nats_per_token": self.fidelity.kl_nats_per_token,
            "top1_agreement": self.fidelity.top1_agreement,
        }


@dataclass(frozen=True)
class Ladder:
    """The model that is measured at every rung, and its questions.

    Attributes:
        run: the config.
        base: the model, unquantised.
        renderer: renders the questions for it.
        questions: rows with their wanted answers.
        artefacts: quantised copies of the model in their own files, by name: GGUF files, AWQ folders.
    """

    run: Run
    base: Base
    renderer: Renderer
    questions: list[Question]
    artefacts: dict[str, Path]


def ladder_of_config(run: Run) -> Ladder:
    """Return the ladder of a config's base on the rows that the config holds out.

    Raises:
        DataError: the config holds out no rows.
    """
    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens)
    renderer = renderer_of(run.data, load_tokenizer(base))
    prepared = prepare(run.data, renderer, run.seed)
    rows = list((prepared.test or prepared.validation).rows())
    if not rows:
        raise DataError(
            "data.train: no rows are held out; set data.test, data.test_frac or"
            " data.validation_frac"
        )
    chosen = random.Random(run.seed).sample(rows, min(run.eval.rows, len(rows)))
    run = with_tool_metrics(run, chosen)
    check_answers(chosen, _without_variants(run), renderer)
    return Ladder(run, base, renderer, questions(chosen, renderer), {})


def _without_variants(run: Run) -> Run:
    """Return the config without the variants of a comparison, which are not measured here."""
    return run.model_copy(update={"eval": run.eval.model_copy(update={"variants": []})})


def ladder_of_run(path: Path, run: Run) -> Ladder:
    """Return the ladder of a run's merged model and its exports, on the rows of the run's comparison.

    Raises:
        RunError: the run is not merged, or a file is not the one that was measured.
    """
    trained = read_trained_run(path, run)
    folder, renderer = trained.folder, trained.renderer
    merged_report(folder)
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    run = with_tool_metrics(run, rows)
    check_answers(rows, _without_variants(run), renderer)
    artefacts = {}
    for export in sorted(folder.export.glob("*/")):
        if is_artefact(export.name) and export.name != "gguf-lora":
            read_artefact(folder, export.name)
            artefacts[export.name] = next(export.glob("*.gguf"), export)
    base = resolve_base(str(folder.merged))
    return Ladder(run, base, renderer, questions(rows, renderer), artefacts)


def measure_ladder(ladder: Ladder, rungs: Sequence[str]) -> list[Rung]:
    """Measure the rungs one after the other, each alone in memory; the first is the reference.

    Raises:
        ConfigError: a name is unknown, or the first rung is not a full precision.
    """
    unknown = [name for name in rungs if name not in RUNGS]
    if unknown or not rungs or rungs[0] not in DTYPES:
        raise ConfigError(
            [
                f"rungs: {', '.join(rungs)}; allowed: {', '.join(RUNGS)}; the first, the reference of the"
                f" others, must be one of {', '.join(DTYPES)}"
            ]
        )
    rows = [(question.ids, question.labels) for question in ladder.questions]
    full: Reference | None = None
    measured = []
    for name in [*rungs, *ladder.artefacts]:
        print(f"{name} …", file=sys.stderr, flush=True)
        with _contender(ladder, name) as contender:
            predict = _predict(contender, ladder)
            if full is None:
                vocabulary = len(ladder.renderer.tokenizer)
                full = reference(predict, rows, vocabulary)
                close = agreement(full.log_probs, full.loss, full)
            else:
                close = fidelity(predict, rows, full)
            model = contender.model if isinstance(contender.model, nn.Module) else None
            num_weights = num_parameters(model) if model is not None else None
            measured.append(Rung(measure(contender, ladder.run), close, num_weights))
        del contender, predict, model
        release()
    return measured


def _predict(contender: Contender, ladder: Ladder) -> Callable[..., Any]:
    """Return the function that predicts log-probabilities with the contender's model."""
    if isinstance(contender.model, GgufModel):
        return contender.model.predict
    return torch_predict(contender.model, ladder.renderer.pad_id)


@contextmanager
def _contender(ladder: Ladder, name: str) -> Iterator[Contender]:
    """Load the model at a rung, or an artefact of it."""
    path = ladder.artefacts.get(name)
    if path is not None and path.suffix == ".gguf":
        with in_llama_cpp(name, path, ladder.questions, ladder.renderer) as contender:
            yield contender
        return
    base = ladder.base if path is None else resolve_base(str(path))
    precision, double_quant = RUNGS.get(name, (None, False))
    run = ladder.run.model_copy(
        update={"model": ladder.run.model.model_copy(update={"double_quant": double_quant})}
    )
    model = load_scored(base, precision, choose_compute(run.model.compute_dtype), run).model
    what = f"{base.name} in {name}" if path is None else f"{base.name}, {_method(model)}"
    size, stored = weights_bytes(model), (Path(base.path),)
    yield Contender(name, what, model, size, ladder.questions, ladder.renderer, stored)


def _method(model: Any) -> str:
    """Return the quantisation method of a stored model."""
    return stored_method(model.config) or "as stored"


def as_markdown(rungs: list[dict[str, Any]], metric: str) -> str:
    """Format the ladder as a Markdown table."""
    scored = metric in rungs[0] and metric != LOSS_METRIC
    head = ["rung", "weights", "bits per weight", "perplexity"]
    head += [f"KL to {rungs[0]['name']}", "top-1 agreement"]
    head += [metric] if scored else []
    head += ["prompt tokens/s", "answer tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for rung in rungs:
        cells = [
            rung["name"],
            f"{rung['weights_bytes'] / 1e6:.1f} MB",
            f"{8 * rung['weights_bytes'] / rungs[0]['num_weights']:.2f}",
            f"{rung['perplexity']:.4f}",
            f"{rung['kl_nats_per_token']:.2e}",
            f"{rung['top1_agreement']:.1%}",
        ]
        if scored:
            cells.append(interval(rung[metric]))
        cells += [rate(rung[key]) for key in ("prompt_tokens_per_s", "tokens_per_s")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def qlora_lines(rungs: list[dict[str, Any]]) -> list[str]:
    """Say whether NF4 loses less than FP4 and double quantisation almost nothing (QLoRA, Table 2 and §3)."""
    by_name = {rung["name"]: rung for rung in rungs}
    lines = []
    for better, worse in (("nf4", "fp4"), ("nf4+dq", "fp4+dq")):
        if better in by_name and worse in by_name:
            ppl = [by_name[name]["perplexity"] for name in (better, worse)]
            kl = [by_name[name]["kl_nats_per_token"] for name in (better, worse)]
            verdict = (
                "as in QLoRA, Table 2" if ppl[0] <= ppl[1] and kl[0] <= kl[1] else "NOT as in QLoRA"
            )
            lines.append(
                f"{better} vs {worse}: perplexity {ppl[0]:.4f} vs {ppl[1]:.4f}, KL {kl[0]:.3e} vs"
                f" {kl[1]:.3e}: {verdict}."
            )
    if "nf4" in by_name and "nf4+dq" in by_name:
        plain, double = by_name["nf4"], by_name["nf4+dq"]
        change = double["perplexity"] / plain["perplexity"] - 1
        saved = 8 * (plain["weights_bytes"] - double["weights_bytes"]) / rungs[0]["num_weights"]
        lines.append(
            f"Double quantisation: perplexity {change:+.2%}, KL {double['kl_nats_per_token']:.3e} instead of"
            f" {plain['kl_nats_per_token']:.3e}, {saved:.3f} bits per weight of the whole model saved."
        )
    return lines
