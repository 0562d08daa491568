"""Owns the refusal of runs that cannot fit, before they cost anything, with overrides that would fit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from halfbyte.config.schema import Run
from halfbyte.errors import PlanError, UntraceableError
from halfbyte.model.precision import NAMES
from halfbyte.plan.advice import choose, models_that_fit, suggest
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.memory import Planner, TrainPlan, checkpointing_text
from halfbyte.plan.shape import Lengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device


def check_weights(run: Run, device: Device) -> None:
    """Refuse weights that the device has no room for before they are downloaded.

    Raises:
        PlanError: the weights do not fit, whatever the training settings.
    """
    config, _ = model_config(run.model.name, run.model.revision)
    planner = Planner(run, config, device)
    if not planner.loads:
        _refuse(
            run,
            f"the weights of {run.model.name} take {planner.stored.true_bytes / 1e9:.2f} GB in"
            f" {run.model.precision}, but {device.title} has only {device.usable_bytes / 1e9:.2f} GB"
            f" available.{_models_hint(device, planner)}",
        )


def gate(
    run: Run,
    config: PretrainedConfig,
    device: Device,
    lengths: Lengths,
    held_out: Lengths | None = None,
) -> tuple[Planner, TrainPlan | None]:
    """Resolve ``auto`` and let a run pass if it fits.

    Returns:
        The planner, and the plan; None if the step cannot be planned and ``train.ignore_plan`` is set.

    Raises:
        PlanError: training cannot fit; the message has overrides that make it fit, if there are any.
        UntraceableError: the model's step cannot be planned.
    """
    planner = Planner(run, config, device, held_out=held_out)
    try:
        plan = _same_on_all_ranks(planner, choose(planner, lengths), lengths)
    except UntraceableError as error:
        if not run.train.ignore_plan:
            raise UntraceableError(
                f"{error}\ntrain.ignore_plan=true trains without a plan"
            ) from error
        print(f"warning: {error}; training without a plan", file=sys.stderr)
        return planner, None
    if not planner.fits(plan):
        suggestions = suggest(run, config, device, lengths, planner)
        lines = "".join(f"\n  {s.override}   ({s.costs})" for s in suggestions)
        advice = (
            f" Any of these makes it fit:{lines}" if suggestions else _models_hint(device, planner)
        )
        _refuse(
            run,
            f"training would need {plan.needed_bytes / 1e9:.2f} GB"
            f" ({plan.micro_batch_size} rows of {plan.length} tokens at a time, checkpointing"
            f" {checkpointing_text(plan.recompute)}), which is"
            f" {-planner.margin_bytes(plan) / 1e9:.2f} GB more than {device.title} has.{advice}",
        )
    return planner, plan


def _same_on_all_ranks(planner: Planner, plan: TrainPlan, lengths: Lengths) -> TrainPlan:
    """Give every rank the plan of rank 0: free memory may differ between the cards of a machine."""
    if planner.world == 1:
        return plan
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=planner.device.kind == "cpu")
    settings = [(plan.micro_batch_size, plan.checkpointing, plan.shape.recompute)]
    broadcast_object_list(settings)
    rows, checkpointing, recompute = settings[0]
    return planner.train(lengths, rows, checkpointing=checkpointing, recompute=recompute)


def _refuse(run: Run, text: str) -> None:
    if not run.train.ignore_plan:
        raise PlanError(f"{text}\ntrain.ignore_plan=true trains in spite of it")
    print(f"warning: {text}\ntrain.ignore_plan is true: continuing", file=sys.stderr)


def _models_hint(device: Device, planner: Planner) -> str:
    known = models_that_fit(device, NAMES[planner.dtype])
    if not known:
        return " No known model can be trained on it; halfbyte plan prints the terms of the plan"
    return f" Models that it can train in 4 bits: {', '.join(known[:5])}"
