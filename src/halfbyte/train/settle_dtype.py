"""Owns the last word on the compute dtype, which only real rows can give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.config.schema import Run
from halfbyte.data.prepare import Example
from halfbyte.forward.fp16_range import settle_half
from halfbyte.model.load import Loaded
from halfbyte.plan.gate import gate
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.shape import Lengths


def settle_plan(
    run: Run,
    loaded: Loaded,
    model: nn.Module,
    examples: Sequence[Example],
    planned: tuple[Planner, TrainPlan | None],
    lengths: tuple[Lengths, Lengths],
) -> tuple[Planner, TrainPlan | None]:
    """``planned``, or a plan in fp32 where ``settle_compute`` goes over to it.

    Raises:
        PlanError: that does not fit.
    """
    settled = settle_compute(run, loaded, model, examples)
    if settled is run:
        return planned
    return gate(settled, planned[0].config, planned[0].device, *lengths)


def settle_compute(run: Run, loaded: Loaded, model: nn.Module, examples: Sequence[Example]) -> Run:
    """Probe fp16 where ``auto`` has come to it; the run, with fp32 in it if that is what is left.

    ``loaded`` says then why, and computes so.
    """
    if loaded.compute.dtype != torch.float16 or run.model.compute_dtype != "auto":
        return run
    settle_half(loaded, model, [(e.encoded.ids, e.encoded.labels) for e in examples])
    if loaded.compute.dtype == torch.float16:
        return run
    settled = run.model.model_copy(update={"compute_dtype": "fp32"})
    return run.model_copy(update={"model": settled})
