"""Owns the memory of steps that recompute only their first layers, bounded by recomputing all or none.

The last layers keep their activations, which the backward pass frees before it recomputes the first layers.
Until then a step needs what it needs without recomputation, minus what the first layers do not keep;
afterwards it needs no more than one that recomputes every layer. The larger of the two is never too low.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from halfbyte.plan.live import Peak
from halfbyte.plan.phases import ACTIVATIONS
from halfbyte.plan.shape import StepShape
from halfbyte.plan.step import TracedStep


def peaks(step: TracedStep, shape: StepShape) -> dict[str, Peak]:
    """Return ``TracedStep.peaks``, also where only ``shape.recompute`` layers are recomputed."""
    if shape.recompute is None:
        return step.peaks(shape)
    none, every = (step.peaks(limit) for limit in _none_and_all(shape))
    saved = saved_bytes(step, shape)
    bounds = {}
    for phase, peak in none.items():
        terms = _with_fewer_activations(peak.terms, saved)
        reduced = Peak(sum(terms.values()), terms)
        bounds[phase] = max(reduced, every[phase], key=lambda bound: bound.total_bytes)
    return bounds


def largest_terms(step: TracedStep, shape: StepShape) -> Counter[str]:
    """Return ``TracedStep.largest_terms``, also where only ``shape.recompute`` layers are recomputed."""
    if shape.recompute is None:
        return step.largest_terms(shape)
    none, every = (step.largest_terms(limit) for limit in _none_and_all(shape))
    return _with_fewer_activations(none, saved_bytes(step, shape)) | every


def kept(step: TracedStep, shape: StepShape) -> int:
    """Return ``TracedStep.kept``, also where only ``shape.recompute`` layers are recomputed."""
    if shape.recompute is None:
        return step.kept(shape)
    return step.kept(_none_and_all(shape)[0]) - saved_bytes(step, shape)


def saved_bytes(step: TracedStep, shape: StepShape) -> int:
    """Return the bytes that the first ``shape.recompute`` layers do not keep.

    A kind with only one layer counts as nothing.
    """
    none, every = (step.kept_by_kind(limit) for limit in _none_and_all(shape))
    return sum(none[kind] - every[kind] for kind in step.kinds[: shape.recompute] if kind in none)


def _none_and_all(shape: StepShape) -> tuple[StepShape, StepShape]:
    return (
        replace(shape, checkpointing=False, recompute=None),
        replace(shape, checkpointing=True, recompute=None),
    )


def _with_fewer_activations(terms: Counter[str], saved: int) -> Counter[str]:
    reduced = Counter(terms)
    reduced[ACTIVATIONS] = max(0, reduced[ACTIVATIONS] - saved)
    return reduced
