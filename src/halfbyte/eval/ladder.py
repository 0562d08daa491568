"""Owns the quantisation ladder: one model at every precision, by what each takes and what each loses."""

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
from halfbyte.eval.measure import LOSS_METRIC, Variant, measure
from halfbyte.eval.pages import interval, rate
from halfbyte.eval.variants import Contender, in_llama_cpp, is_artefact, load_scored, release
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.footprint import num_parameters, weights_bytes
from halfbyte.model.load import load_tokenizer, stored_method
from halfbyte.model.merged import MERGE_REPORT
from halfbyte.model.precision import DTYPES, choose_compute
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.run_dir import RunDir
from halfbyte.trained.artefact import read_artefact
from halfbyte.trained.fidelity import (
    Fidelity,
    Reference,
    agreement,
    fidelity,
    reference,
    torch_predict,
)
from halfbyte.trained.run import saved_renderer, trained_base

# Name, precision, double quantisation. The first is what the others are held against.
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
    """One precision: the answers and the speed of a variant, and how far it is from the full one."""

    variant: Variant
    fidelity: Fidelity
    num_weights: int | None  # None: not counted

    def as_json(self, run: Run) -> dict[str, Any]:
        """For ladder.json."""
        return {
            **self.variant.as_json(run),
            "num_weights": self.num_weights,
            "perplexity": math.exp(self.fidelity.loss),
            "kl_nats_per_token": self.fidelity.kl_nats_per_token,
            "top1_agreement": self.fidelity.top1_agreement,
        }


@dataclass(frozen=True)
class Climb:
    """What is measured at every rung.

    Attributes:
        base: the model, unquantised.
        asked: rows with their wanted answers.
        artefacts: quantised copies of it in files of their own, by name: GGUF files, AWQ folders.
    """

    run: Run
    base: Base
    renderer: Renderer
    asked: list[Question]
    artefacts: dict[str, Path]


def of_config(run: Run) -> Climb:
    """The base of a config, on the rows that it holds out.

    Raises:
        DataError: it holds none out.
    """
    base = resolve_base(run.model.name, run.model.revision)
    renderer = renderer_of(run.data, load_tokenizer(base))
    prepared = prepare(run.data, renderer)
    rows = [example.row for example in prepared.test or prepared.validation]
    if not rows:
        raise DataError(
            f"{run.data.train}: no rows are held out; set data.test, data.test_frac or"
            " data.validation_frac"
        )
    chosen = random.Random(run.seed).sample(rows, min(run.eval.rows, len(rows)))
    check_answers(chosen, _alone(run))
    return Climb(run, base, renderer, questions(chosen, renderer), {})


def _alone(run: Run) -> Run:
    """The config without the variants of a comparison, which are not measured here."""
    return run.model_copy(update={"eval": run.eval.model_copy(update={"variants": []})})


def of_run(folder: RunDir, run: Run) -> Climb:
    """The merged model of a run with what was made of it, on the rows of the run's comparison.

    Raises:
        RunError: it is not merged, or an artefact is not the one that was proven.
    """
    folder.need(folder.merged / MERGE_REPORT, f"python train/merge.py {folder.path}")
    renderer = saved_renderer(folder, run, trained_base(folder, run))
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    check_answers(rows, _alone(run))
    artefacts = {}
    for path in sorted(folder.export.glob("*/")):
        if is_artefact(path.name) and path.name != "gguf-lora":
            read_artefact(folder, path.name)
            artefacts[path.name] = next(path.glob("*.gguf"), path)
    base = resolve_base(str(folder.merged))
    return Climb(run, base, renderer, questions(rows, renderer), artefacts)


def climb(work: Climb, rungs: Sequence[str]) -> list[Rung]:
    """Measure the rungs one after the other, each alone in memory; the full precision comes first.

    Raises:
        ConfigError: a name is unknown, or the first rung is none that others can be held against.
    """
    unknown = [name for name in rungs if name not in RUNGS]
    if unknown or not rungs or rungs[0] not in DTYPES:
        raise ConfigError(
            [
                f"rungs: {', '.join(rungs)}; allowed: {', '.join(RUNGS)}, and the first of them one of"
                f" {', '.join(DTYPES)}, which the others are held against"
            ]
        )
    rows = [(question.ids, question.labels) for question in work.asked]
    full: Reference | None = None
    found = []
    for name in [*rungs, *work.artefacts]:
        print(f"{name} …", file=sys.stderr, flush=True)
        with _standing(work, name) as contender:
            predict = _predict(contender, work)
            if full is None:
                vocabulary = len(work.renderer.tokenizer)
                full = reference(predict, rows, vocabulary)
                close = agreement(full.log_probs, full.loss, full)
            else:
                close = fidelity(predict, rows, full)
            counted = contender.model if isinstance(contender.model, nn.Module) else None
            size = num_parameters(counted) if counted is not None else None
            found.append(Rung(measure(contender, work.run), close, size))
        del contender, predict, counted
        release()
    return found


def _predict(contender: Contender, work: Climb) -> Callable[..., Any]:
    if isinstance(contender.model, GgufModel):
        return contender.model.predict
    return torch_predict(contender.model, work.renderer.pad_id)


@contextmanager
def _standing(work: Climb, name: str) -> Iterator[Contender]:
    """The model at a rung, or an artefact of it, in memory."""
    path = work.artefacts.get(name)
    if path is not None and path.suffix == ".gguf":
        with in_llama_cpp(name, path, work.asked, work.renderer) as contender:
            yield contender
        return
    base = work.base if path is None else resolve_base(str(path))
    precision, double_quant = RUNGS.get(name, (None, False))
    run = work.run.model_copy(
        update={"model": work.run.model.model_copy(update={"double_quant": double_quant})}
    )
    model = load_scored(base, precision, choose_compute(run.model.compute_dtype), run).model
    what = f"{base.name} in {name}" if path is None else f"{base.name}, {_method(model)}"
    size, stored = weights_bytes(model), (Path(base.path),)
    yield Contender(name, what, model, size, work.asked, work.renderer, stored)


def _method(model: Any) -> str:
    return stored_method(model.config) or "as stored"


def as_markdown(rungs: list[dict[str, Any]], metric: str) -> str:
    """The ladder as a table."""
    scored = metric in rungs[0] and metric != LOSS_METRIC
    head = ["rung", "weights", "bits a weight", "perplexity", "KL to the first", "top-1 alike"]
    head += [metric] if scored else []
    head += ["tokens/s prompt", "tokens/s answer"]
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


def in_order(rungs: list[dict[str, Any]]) -> list[str]:
    """Whether NF4 loses less than FP4 and double quantisation next to nothing (QLoRA, Table 2 and §3), in words."""
    known = {rung["name"]: rung for rung in rungs}
    said = []
    for better, worse in (("nf4", "fp4"), ("nf4+dq", "fp4+dq")):
        if better in known and worse in known:
            ppl = [known[name]["perplexity"] for name in (better, worse)]
            kl = [known[name]["kl_nats_per_token"] for name in (better, worse)]
            verdict = (
                "as in QLoRA, Table 2" if ppl[0] <= ppl[1] and kl[0] <= kl[1] else "NOT as in QLoRA"
            )
            said.append(
                f"{better} against {worse}: perplexity {ppl[0]:.4f} and {ppl[1]:.4f}, KL {kl[0]:.3e} and"
                f" {kl[1]:.3e}: {verdict}."
            )
    if "nf4" in known and "nf4+dq" in known:
        plain, double = known["nf4"], known["nf4+dq"]
        change = double["perplexity"] / plain["perplexity"] - 1
        saved = 8 * (plain["weights_bytes"] - double["weights_bytes"]) / rungs[0]["num_weights"]
        said.append(
            f"Double quantisation: perplexity {change:+.2%}, KL {double['kl_nats_per_token']:.3e} after"
            f" {plain['kl_nats_per_token']:.3e}, {saved:.3f} bits a weight of the whole model saved."
        )
    return said
