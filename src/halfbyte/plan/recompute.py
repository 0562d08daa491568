"""Owns steps that recompute only their first layers: between a step that recomputes all and one that does none.

The last layers keep their activations: the backward pass frees those before it recomputes the first.
Until then a step takes what it takes without recomputation, less what the first layers do not keep;
afterwards no more than one that recomputes every layer. The larger of the two is never too low.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from halfbyte.plan.live import Peak
from halfbyte.plan.shape import StepShape
from halfbyte.plan.step import ACTIVATIONS, TracedStep


def peaks(step: TracedStep, shape: StepShape) -> dict[str, Peak]:
    """``TracedStep.peaks``, also where ``shape.recompute`` layers are recomputed."""
    if shape.recompute is None:
        return step.peaks(shape)
    none, every = (step.peaks(end) for end in _ends(shape))
    saved = saved_bytes(step, shape)
    found = {}
    for phase, peak in none.items():
        terms = _less(peak.terms, saved)
        less = Peak(sum(terms.values()), terms)
        found[phase] = max(less, every[phase], key=lambda one: one.total_bytes)
    return found


def most(step: TracedStep, shape: StepShape) -> Counter[str]:
    """``TracedStep.most``, likewise."""
    if shape.recompute is None:
        return step.most(shape)
    none, every = (step.most(end) for end in _ends(shape))
    return _less(none, saved_bytes(step, shape)) | every


def kept(step: TracedStep, shape: StepShape) -> int:
    """``TracedStep.kept``, likewise."""
    if shape.recompute is None:
        return step.kept(shape)
    return step.kept(_ends(shape)[0]) - saved_bytes(step, shape)


def saved_bytes(step: TracedStep, shape: StepShape) -> int:
    """What the first ``shape.recompute`` layers do not keep; kinds with one layer alone count as nothing."""
    none, every = (step.kept_by_kind(end) for end in _ends(shape))
    return sum(none[kind] - every[kind] for kind in step.kinds[: shape.recompute] if kind in none)


def _ends(shape: StepShape) -> tuple[StepShape, StepShape]:
    return (
        replace(shape, checkpointing=False, recompute=None),
        replace(shape, checkpointing=True, recompute=None),
    )


def _less(terms: Counter[str], saved: int) -> Counter[str]:
    fewer = Counter(terms)
    fewer[ACTIVATIONS] = max(0, fewer[ACTIVATIONS] - saved)
    return fewer
