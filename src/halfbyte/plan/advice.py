"""Owns advice on a plan: settings that fit, and what to change where none of them does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.schema import Run
from halfbyte.config.section import FOUR_BIT
from halfbyte.errors import PlanError
from halfbyte.model.merged import keeps_training
from halfbyte.plan.catalogue import known_models
from halfbyte.plan.devices import DEVICES
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.shape import Lengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device

SHORTEST = 128  # tokens; shorter rows are not worth suggesting
RANKS = (8, 4)
# Tokens of a pass above which more of them make a step no faster. CPU: steps of SmolLM2 reached the same
# 160 GFLOP/s with 550, 1,000 and 1,100 tokens on two cores. CUDA, not measured: at this size unpacking the
# weights of a 4B model (8.1 GB) would take 3 % of the time of an H100's matrix products (20 µs a token).
ENOUGH_TOKENS = {"cpu": 512, "cuda": 8192}
UNPACKING_TOKENS = {"cpu": 15, "cuda": 250}  # take as long as unpacking all weights; same sources
MORE_TOKENS_FRAC = 0.02
SMALLER_BATCH = "same result, with more and smaller micro-batches"
COSTS = {
    "model.precision": "the base model in {}",
    "model.double_quant": "double quantisation",
    "train.optimizer": "8-bit optimizer states",
    "adapter.r": "rank {}",
    "data.max_length": "rows of at most {} tokens (data.on_overlength decides about longer ones)",
}
RECOMPUTE = "same result, but the forward pass runs twice"
RECOMPUTE_SOME = "same result, but the forward pass of {} of {} layers runs twice"


@dataclass(frozen=True)
class Suggestion:
    """Holds settings that fit, as overrides to paste, and what they cost."""

    override: str
    costs: str
    plan: TrainPlan
    margin_bytes: int


def choose(planner: Planner, lengths: Lengths) -> TrainPlan:
    """Resolve ``auto``: the largest micro-batch that helps and fits, checkpointing only where needed.

    Where nothing fits, return the allowed settings that need the least memory.

    Raises:
        PlanError: the config checkpoints more layers than the model has.
    """
    train = planner.run.train
    mode, layers = train.checkpointing, train.recomputed_layers
    if train.micro_batch_size == "auto":
        sizes = _useful_sizes(planner, lengths, micro_batches(train.batch_size // planner.world))
    else:
        sizes = [train.micro_batch_size]
    if layers is not None and layers > planner.num_layers:
        raise PlanError(
            f"train.checkpointing is {layers}, but the model has {planner.num_layers} layers; allowed:"
            f" auto, on, off or 1 to {planner.num_layers}"
        )
    if not planner.loads:
        return planner.train(lengths, sizes[-1], checkpointing=mode != "off", recompute=layers)
    if mode != "auto":
        return _largest_that_fits(planner, lengths, sizes, mode != "off", layers)
    plan = _largest_that_fits(planner, lengths, sizes, False)
    if planner.fits(plan) and plan.micro_batch_size == sizes[0]:
        return plan
    checkpointed = _fewest_layers(
        planner, lengths, _largest_that_fits(planner, lengths, sizes, True)
    )
    if not planner.fits(plan):
        return checkpointed
    return min((plan, checkpointed), key=lambda one: _step_cost(planner, lengths, one))


def _fewest_layers(planner: Planner, lengths: Lengths, plan: TrainPlan) -> TrainPlan:
    """Checkpoint as few layers as fit at the same micro-batch; return a plan that does not fit as it is."""
    rows, low, high = plan.micro_batch_size, 1, planner.num_layers
    if not planner.fits(plan):
        return plan
    while low < high:
        middle = (low + high) // 2
        fewer = planner.train(lengths, rows, checkpointing=True, recompute=middle)
        if planner.fits(fewer):
            plan, high = fewer, middle
        else:
            low = middle + 1
    return plan


def _step_cost(planner: Planner, lengths: Lengths, plan: TrainPlan) -> float:
    """Estimate the time of a step, in tokens that pass forward and backward once.

    Each pass unpacks every weight, which takes as long as ``UNPACKING_TOKENS``. Recomputing a layer adds a
    second forward pass; where weights have no gradient, forward and backward passes take equally long.
    """
    tokens = lengths.tokens(plan.micro_batch_size, share=planner.step.shares)
    recomputed_frac = 0.0
    if plan.checkpointing:
        recomputed_frac = (plan.shape.recompute or planner.num_layers) / planner.num_layers
    unpacking = UNPACKING_TOKENS[planner.device.kind]
    return plan.accumulation * (tokens + unpacking) * (1 + recomputed_frac / 2)


def suggest(
    run: Run, config: PretrainedConfig, device: Device, lengths: Lengths, planner: Planner
) -> list[Suggestion]:
    """Return changes that make a run fit, the gentlest first; none if nothing would help."""
    sizes = micro_batches(run.train.batch_size // planner.world)
    gentle = []
    for checkpointing in (False, True) if planner.loads else ():
        plan = _largest_that_fits(planner, lengths, sizes, checkpointing)
        if planner.fits(plan):
            plan = _fewest_layers(planner, lengths, plan) if checkpointing else plan
            gentle.append(_suggestion(planner, plan, {}))
    if gentle:
        return gentle

    def planner_if_it_fits(changes: dict[str, Any]) -> tuple[Planner, Lengths] | None:
        """Return what plans a run with these changes, if one row at a time fits with checkpointing."""
        changed = _with_changes(run, changes)
        same_model = (changed.model, changed.adapter) == (run.model, run.adapter)
        step = planner.step if same_model else None
        other = Planner(changed, config, device, step, planner.held_out)
        if not other.loads or sum(other.fixed_bytes().values()) > device.usable_bytes:
            return None
        rows = lengths.at_most(changes.get("data.max_length", lengths.rows[0][0]))
        return (other, rows) if other.fits(other.train(rows, 1, checkpointing=True)) else None

    attempts = (
        (step, planner_if_it_fits(step)) for step in _stronger_changes(run, lengths, device)
    )
    changes, fitting = next((one for one in attempts if one[1] is not None), ({}, None))
    if fitting is None:
        return []
    for key in [key for key in changes if key in COSTS]:  # drop what the others make needless
        dropped = {key, "adapter.alpha"} if key == "adapter.r" else {key}
        fewer = {other: value for other, value in changes.items() if other not in dropped}
        without = planner_if_it_fits(fewer)
        if without is not None:
            changes, fitting = fewer, without
    best = _largest_that_fits(*fitting, sizes, checkpointing=True)
    return [_suggestion(fitting[0], best, changes)]


def micro_batches(rows: int) -> list[int]:
    """Return the micro-batch sizes that divide the rows of a step, the largest first."""
    return [size for size in range(rows, 0, -1) if rows % size == 0]


def models_that_fit(device: Device, compute_dtype: str) -> list[str]:
    """Return the known models that a card can train in NF4, the largest first.

    They train one row of 512 tokens at a time.
    """
    return [
        f"{known.names[0]} ({known.parameters / 1e9:.1f} B)"
        for known in reversed(known_models())
        if known.training.get(
            "fp32" if compute_dtype == "fp32" else "bf16", device.usable_bytes + 1
        )
        <= device.usable_bytes
    ]


def cards_that_fit(run: Run, config: PretrainedConfig, lengths: Lengths) -> list[str]:
    """Return the known cards that could train this with the settings that need the least memory.

    The smallest card comes first.
    """
    fitting = []
    for largest in ("h200", "v100-32gb"):  # with bf16 and flash kernels, and without
        alike = [d for d in DEVICES.values() if d.has_bf16 == DEVICES[largest].has_bf16]
        try:
            planner = Planner(run, config, DEVICES[largest])
        except PlanError:  # the config sets bf16
            continue
        plan = planner.train(lengths, 1, checkpointing=True)
        fitting += [device for device in alike if plan.held_bytes <= device.usable_bytes]
    return [device.name for device in sorted(fitting, key=lambda device: device.total_bytes)]


def _useful_sizes(planner: Planner, lengths: Lengths, sizes: list[int]) -> list[int]:
    """Drop the sizes that only take memory: above ``ENOUGH_TOKENS`` a pass is no faster.

    Each further pass computes the prefix that rows share again. A larger size is therefore kept where the
    next smaller one would add more than ``MORE_TOKENS_FRAC`` to the tokens of a step.
    """
    enough = ENOUGH_TOKENS[planner.device.kind]
    whole = lengths.tokens(sizes[0], share=planner.step.shares)
    shared = lengths.shared if planner.step.shares else 0
    useful = [sizes[0]]
    for size in sizes[1:]:
        repeated_tokens = (sizes[0] // size - 1) * shared
        tokens = lengths.tokens(size, share=planner.step.shares)
        if tokens < enough or repeated_tokens > MORE_TOKENS_FRAC * whole:
            break
        useful.append(size)
    return sizes[len(useful) - 1 :]


def _largest_that_fits(
    planner: Planner,
    lengths: Lengths,
    sizes: list[int],
    checkpointing: bool,
    recompute: int | None = None,
) -> TrainPlan:
    """Return the plan of the largest size that fits, else that of the smallest; bytes grow with the size."""

    def plan_of(size: int) -> TrainPlan:
        return planner.train(lengths, size, checkpointing=checkpointing, recompute=recompute)

    low, high = 0, len(sizes) - 1  # most runs want the largest, which is tried first
    best = plan_of(sizes[0])
    if planner.fits(best) or high == 0:
        return best
    low, best = 1, plan_of(sizes[high])
    if not planner.fits(best):
        return best
    while low < high:
        middle = (low + high) // 2
        plan = plan_of(sizes[middle])
        if planner.fits(plan):
            best, high = plan, middle
        else:
            low = middle + 1
    return best


def _stronger_changes(run: Run, lengths: Lengths, device: Device) -> Iterator[dict[str, Any]]:
    """Yield changes that alter the result of the run, each together with those before it."""
    changes: dict[str, Any] = {}
    if run.adapter.init in ("pissa", "olora"):
        pass  # these rewrite the base model, which must be in fp32 for that
    elif run.model.precision not in FOUR_BIT and keeps_training(Path(run.model.name), "nf4"):
        changes["model.precision"] = "nf4"
        yield dict(changes)
    elif run.model.precision in FOUR_BIT and not run.model.double_quant:
        changes["model.double_quant"] = True
        yield dict(changes)
    if "8bit" not in run.train.optimizer and run.train.optimizer not in ("adafactor", "sgd"):
        changes["train.optimizer"] = "paged_adamw_8bit" if device.kind == "cuda" else "adamw_8bit"
        yield dict(changes)
    for rank in RANKS:
        if rank < run.adapter.r:
            changes["adapter.r"] = rank
            ratio = rank / run.adapter.r
            factor = math.sqrt(ratio) if run.adapter.rslora else ratio
            changes["adapter.alpha"] = run.adapter.alpha * factor  # so that the LoRA scale stays
            yield dict(changes)
    longest = lengths.rows[0][0]
    while longest // 2 >= SHORTEST:
        longest //= 2
        changes["data.max_length"] = longest
        yield dict(changes)


def _with_changes(run: Run, changes: dict[str, Any]) -> Run:
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        settings = getattr(run, section).model_copy(update={key: value})
        run = run.model_copy(update={section: settings})
    return run


def _suggestion(planner: Planner, plan: TrainPlan, changes: dict[str, Any]) -> Suggestion:
    costs = [COSTS[key].format(value) for key, value in changes.items() if key in COSTS]
    layers = plan.shape.recompute
    recompute = RECOMPUTE if layers is None else RECOMPUTE_SOME.format(layers, planner.num_layers)
    costs.append(recompute if plan.checkpointing else SMALLER_BATCH)
    return Suggestion(
        override_line(plan, changes), "; ".join(costs), plan, planner.margin_bytes(plan)
    )


def override_line(plan: TrainPlan, changes: dict[str, Any] | None = None) -> str:
    """Return the settings of a plan as overrides to paste."""
    parts = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in (changes or {}).items()
    ]
    parts.append(f"train.micro_batch_size={plan.micro_batch_size}")
    parts.append(f"train.checkpointing={plan.recompute}")
    return " ".join(parts)
