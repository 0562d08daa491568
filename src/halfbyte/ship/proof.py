"""Owns the proof of an artefact: its engine reloads it for comparison with the trained and merged models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from halfbyte.config.schema import Export
from halfbyte.data.questions import Question
from halfbyte.errors import RunError
from halfbyte.generate.batched import Answer
from halfbyte.ship.measured_run import MeasuredRun
from halfbyte.trained.fidelity import Fidelity, Reference, Rows, agreement


class EngineModel(Protocol):
    """An artefact loaded in the engine that will serve it."""

    def predict(self, rows: Rows, positions: list[list[int]], vocabulary: int) -> Any:
        """Return log-probabilities and the loss, like ``fidelity.Predict``."""

    def answers(
        self, prompts: list[list[int]], *, stop_ids: list[int], max_new_tokens: int
    ) -> list[Answer]:
        """Generate greedy answers."""

    def prompt(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[int]]:
        """Return the text and ids of a generation prompt, using the artefact's template and tokenizer."""

    def ends(self, token: int) -> bool:
        """Return whether the artefact itself declares that generation ends with this token."""


@dataclass(frozen=True)
class Exam:
    """Held-out questions, and a function that grades answers: metric to value and interval."""

    questions: list[Question]
    grade: Callable[[list[str]], dict[str, dict[str, Any]]]
    max_new_tokens: int


@dataclass(frozen=True)
class References:
    """The predictions that artefacts are compared with."""

    trained: Reference
    merged: Reference
    merged_fidelity: Fidelity  # the merged model compared with the trained one


@dataclass(frozen=True)
class Proof:
    """The results of comparing an artefact; matching prompts are counted out of ``conversations``."""

    trained: Fidelity
    merged: Fidelity
    merged_loss: float
    conversations: int
    same_text: int
    same_ids: int
    first_difference: str | None
    missing_stops: list[int]
    scores: dict[str, dict[str, Any]]

    @property
    def perplexity_change(self) -> float:
        """The change of the perplexity relative to the merged model's."""
        from math import exp

        return exp(self.trained.loss - self.merged_loss) - 1

    def as_json(self) -> dict[str, Any]:
        """Return the figures for export_report.json."""
        return {
            "against_trained": self.trained.as_json(),
            "against_merged": self.merged.as_json(),
            "perplexity": self.trained.perplexity,
            "perplexity_change": self.perplexity_change,
            "conversations": self.conversations,
            "same_text": self.same_text,
            "same_ids": self.same_ids,
            "scores": self.scores,
        }


def prove(
    measured: MeasuredRun, engine: EngineModel, references: References, exam: Exam | None
) -> Proof:
    """Measure an artefact, opened in its engine, on the run's rows."""
    # Both references have the same vocabulary size, so they use the same positions.
    columns = references.trained.log_probs.shape[1]
    positions = references.trained.positions
    log_probs, loss = engine.predict(measured.rows, positions, columns)
    same_text = same_ids = 0
    first = None
    for row in measured.conversations:
        wanted_text, wanted_ids = measured.prompt(row)
        text, ids = engine.prompt(*measured.turns(row))
        same_text += text == wanted_text
        same_ids += ids == wanted_ids
        if first is None and (text, ids) != (wanted_text, wanted_ids):
            first = _difference(wanted_text, text, wanted_ids, ids)
    renderer, scores = measured.trained.renderer, {}
    if exam is not None:
        answers = engine.answers(
            [question.prompt for question in exam.questions],
            stop_ids=renderer.stop_ids,
            max_new_tokens=exam.max_new_tokens,
        )
        scores = exam.grade([renderer.decode(answer.ids) for answer in answers])
    return Proof(
        agreement(log_probs, loss, references.trained),
        agreement(log_probs, loss, references.merged),
        references.merged.loss,
        len(measured.conversations),
        same_text,
        same_ids,
        first,
        [token for token in renderer.stop_ids if not engine.ends(token)],
        scores,
    )


def refuse_unproven(name: str, proof: Proof, settings: Export, *, lossless: bool) -> None:
    """Refuse an artefact that differs too much from the trained model.

    ``lossless`` means weights in 16 or 32 bits, which lose nothing to quantisation.

    Raises:
        RunError: it is a different model, uses another template, or would not stop generating.
    """
    faults = []
    if proof.same_text < proof.conversations or proof.same_ids < proof.conversations:
        faults.append(
            f"its chat template or tokenizer is another: text equal in {proof.same_text} and ids in"
            f" {proof.same_ids} of {proof.conversations} conversations ({proof.first_difference})"
        )
    if proof.missing_stops:
        faults.append(f"generation would not end at {proof.missing_stops}")
    max_kl = settings.max_kl if lossless else settings.max_quantised_kl
    min_top1 = settings.min_top1 if lossless else settings.min_quantised_top1
    trained = proof.trained
    if not trained.kl_nats_per_token <= max_kl or trained.top1_agreement < min_top1:
        faults.append(
            f"it is not the trained model: KL {trained.kl_nats_per_token:.2e} nats/token, top-1"
            f" {trained.top1_agreement:.2%}; allowed: KL {max_kl:g}, top-1 {min_top1:.0%}"
        )
    if faults:
        keys = "max_kl and export.min_top1" if lossless else "max_quantised_kl and …_top1"
        raise RunError(
            f"{name}: {'; '.join(faults)}. Nothing was kept. Limits are export.{keys}; other types: --quant"
        )


def _difference(wanted_text: str, text: str, wanted_ids: list[int], ids: list[int]) -> str:
    """Return where two prompts first differ, for an error message."""
    if text != wanted_text:
        at = next(
            (i for i, (a, b) in enumerate(zip(wanted_text, text, strict=False)) if a != b),
            min(len(text), len(wanted_text)),
        )
        return (
            f"{wanted_text[max(0, at - 20) : at + 20]!r} became {text[max(0, at - 20) : at + 20]!r}"
        )
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted_ids, ids, strict=False)) if a != b),
        min(len(ids), len(wanted_ids)),
    )
    return f"token {at}: {wanted_ids[at : at + 3]} became {ids[at : at + 3]}"
