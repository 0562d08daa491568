"""Owns the refusal: what cannot fit stops before it costs anything, with the line to paste."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from halfbyte.config.schema import Run
from halfbyte.errors import PlanError, UntraceableError
from halfbyte.model.precision import NAMES
from halfbyte.plan.advice import choose, models_that_fit, suggest
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.memory import Planner, TrainPlan, layers_words
from halfbyte.plan.shape import Lengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device


def check_weights(run: Run, device: Device) -> None:
    """Stop before a download of weights that the device has no room for.

    Raises:
        PlanError: they would not fit, whatever the settings of the training.
    """
    config, _ = model_config(run.model.name, run.model.revision)
    planner = Planner(run, config, device)
    if not planner.loads:
        _refuse(
            run,
            f"the weights of {run.model.name} take {planner.stored.true_bytes / 1e9:.2f} GB in"
            f" {run.model.precision}, and {device.title} has {device.usable_bytes / 1e9:.2f} GB to"
            f" give.{_instead(device, planner)}",
        )


def gate(
    run: Run,
    config: PretrainedConfig,
    device: Device,
    lengths: Lengths,
    held_out: Lengths | None = None,
) -> tuple[Planner, TrainPlan | None]:
    """Settle ``auto`` and let through what fits; no plan if there is none and it is to be ignored.

    Raises:
        PlanError: training cannot fit; the message has overrides that make it fit, if any do.
        UntraceableError: the model's step cannot be planned.
    """
    planner = Planner(run, config, device, held_out=held_out)
    try:
        plan = _agreed(planner, choose(planner, lengths), lengths)
    except UntraceableError as error:
        if not run.train.ignore_plan:
            raise UntraceableError(
                f"{error}\ntrain.ignore_plan=true trains without a plan"
            ) from error
        print(f"warning: {error}; training without a plan", file=sys.stderr)
        return planner, None
    if not planner.fits(plan):
        found = suggest(run, config, device, lengths, planner)
        lines = "".join(f"\n  {s.override}   ({s.costs})" for s in found)
        helps = f" Any of these makes it fit:{lines}" if found else _instead(device, planner)
        _refuse(
            run,
            f"training would need {plan.needed_bytes / 1e9:.2f} GB"
            f" ({plan.micro_batch_size} rows of {plan.length} tokens at a time, checkpointing"
            f" {layers_words(plan.recompute)}), which is"
            f" {-planner.margin_bytes(plan) / 1e9:.2f} GB more than {device.title} has.{helps}",
        )
    return planner, plan


def _agreed(planner: Planner, plan: TrainPlan, lengths: Lengths) -> TrainPlan:
    """The plan of rank 0, on every rank: what is free may differ between the cards of a machine."""
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
    print(f"warning: {text}\ntrain.ignore_plan is true: going on", file=sys.stderr)


def _instead(device: Device, planner: Planner) -> str:
    known = models_that_fit(device, NAMES[planner.dtype])
    if not known:
        return " No known model trains on it; see python train/plan.py for the terms"
    return f" Models that it trains in 4 bits: {', '.join(known[:5])}"
