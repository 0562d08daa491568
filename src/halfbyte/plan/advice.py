"""Owns the verdict's other half: settings that fit, and what to change when none of them does."""

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

SHORTEST = 128  # tokens; below that a row of data is hardly a row
RANKS = (8, 4)
# Tokens of a pass from which on more are no faster. CPU: steps of SmolLM2 came to the same 160 GFLOP/s at
# 550, 1,000 and 1,100 tokens on two cores. CUDA, not measured: where unpacking the weights of a 4B model
# (8.1 GB) would be 3 % of an H100's products (20 µs a token).
ENOUGH_TOKENS = {"cpu": 512, "cuda": 8192}
UNPACKING_TOKENS = {"cpu": 15, "cuda": 250}  # that take as long as unpacking the weights, likewise
MORE_TOKENS_FRAC = 0.02
SMALLER_BATCH = "same result, more and smaller passes"
COSTS = {
    "model.precision": "a base in {}",
    "model.double_quant": "double quantisation",
    "train.optimizer": "optimizer states in 8 bits",
    "adapter.r": "rank {}",
    "data.max_length": "rows of at most {} tokens (data.on_overlength says what becomes of longer ones)",
}
RECOMPUTE = "same result, each step computes its forward pass twice"
RECOMPUTE_SOME = "same result, each step computes {} of its {} layers twice"


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit, as overrides to paste, and what they cost."""

    override: str
    costs: str
    plan: TrainPlan
    margin_bytes: int


def choose(planner: Planner, lengths: Lengths) -> TrainPlan:
    """Resolve ``auto``: the largest micro-batch that helps and fits, recomputing only where needed.

    Where nothing fits, the least hungry of the allowed settings.

    Raises:
        PlanError: more layers are to be recomputed than there are.
    """
    train = planner.run.train
    asked, layers = train.checkpointing, train.recomputed_layers
    if train.micro_batch_size == "auto":
        sizes = _useful(planner, lengths, micro_batches(train.batch_size // planner.world))
    else:
        sizes = [train.micro_batch_size]
    if layers is not None and layers > planner.num_layers:
        raise PlanError(
            f"train.checkpointing is {layers}, but the model has {planner.num_layers} layers; allowed:"
            f" auto, on, off or 1 to {planner.num_layers}"
        )
    if not planner.loads:
        return planner.train(lengths, sizes[-1], checkpointing=asked != "off", recompute=layers)
    if asked != "auto":
        return _largest(planner, lengths, sizes, asked != "off", layers)
    plan = _largest(planner, lengths, sizes, False)
    if planner.fits(plan) and plan.micro_batch_size == sizes[0]:
        return plan
    other = _fewest_layers(planner, lengths, _largest(planner, lengths, sizes, True))
    if not planner.fits(plan):
        return other
    return min((plan, other), key=lambda one: _cost(planner, lengths, one))


def _fewest_layers(planner: Planner, lengths: Lengths, plan: TrainPlan) -> TrainPlan:
    """The same micro-batch with as few layers recomputed as fit; the plan itself if it does not fit."""
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


def _cost(planner: Planner, lengths: Lengths, plan: TrainPlan) -> float:
    """Time of a step, in tokens that go forward and backward once.

    A pass unpacks every weight, for as long as some tokens take; recomputing a layer adds a forward pass
    to a forward and a backward one, which are alike where weights have no gradient.
    """
    tokens = lengths.tokens(plan.micro_batch_size, share=planner.step.shares)
    share = 0.0
    if plan.checkpointing:
        share = (plan.shape.recompute or planner.num_layers) / planner.num_layers
    unpacking = UNPACKING_TOKENS[planner.device.kind]
    return plan.accumulation * (tokens + unpacking) * (1 + share / 2)


def suggest(
    run: Run, config: PretrainedConfig, device: Device, lengths: Lengths, planner: Planner
) -> list[Suggestion]:
    """Changes that make a run fit which does not, the gentlest first; none if nothing would help."""
    sizes = micro_batches(run.train.batch_size // planner.world)
    gentle = []
    for checkpointing in (False, True) if planner.loads else ():
        plan = _largest(planner, lengths, sizes, checkpointing)
        if planner.fits(plan):
            plan = _fewest_layers(planner, lengths, plan) if checkpointing else plan
            gentle.append(_suggestion(planner, plan, {}))
    if gentle:
        return gentle

    def least(changes: dict[str, Any]) -> tuple[Planner, Lengths] | None:
        """What plans these changes, if they fit a row at a time and recomputing."""
        changed = _changed(run, changes)
        same = (changed.model, changed.adapter) == (run.model, run.adapter)
        step = planner.step if same else None
        other = Planner(changed, config, device, step, planner.held_out)
        if not other.loads or sum(other.fixed_bytes().values()) > device.usable_bytes:
            return None
        rows = lengths.at_most(changes.get("data.max_length", lengths.rows[0][0]))
        return (other, rows) if other.fits(other.train(rows, 1, checkpointing=True)) else None

    tried = ((step, least(step)) for step in _harder(run, lengths, device))
    changes, found = next((one for one in tried if one[1] is not None), ({}, None))
    if found is None:
        return []
    for key in [key for key in changes if key in COSTS]:  # take back what the others make needless
        gone = {key, "adapter.alpha"} if key == "adapter.r" else {key}
        fewer = {other: value for other, value in changes.items() if other not in gone}
        without = least(fewer)
        if without is not None:
            changes, found = fewer, without
    best = _largest(*found, sizes, checkpointing=True)
    return [_suggestion(found[0], best, changes)]


def micro_batches(rows: int) -> list[int]:
    """Sizes that divide the rows of a step, the largest first."""
    return [size for size in range(rows, 0, -1) if rows % size == 0]


def models_that_fit(device: Device, compute_dtype: str) -> list[str]:
    """Known models that a card can train in NF4, a row of 512 tokens at a time; the largest first."""
    return [
        f"{known.names[0]} ({known.parameters / 1e9:.1f} B)"
        for known in reversed(known_models())
        if known.training.get(
            "fp32" if compute_dtype == "fp32" else "bf16", device.usable_bytes + 1
        )
        <= device.usable_bytes
    ]


def cards_that_fit(run: Run, config: PretrainedConfig, lengths: Lengths) -> list[str]:
    """Cards of the table that could train this in the least hungry settings, the smallest first."""
    found = []
    for largest in ("h200", "v100-32gb"):  # with bf16 and flash kernels, and without
        same = [d for d in DEVICES.values() if d.has_bf16 == DEVICES[largest].has_bf16]
        try:
            planner = Planner(run, config, DEVICES[largest])
        except PlanError:  # bf16 is asked for
            continue
        plan = planner.train(lengths, 1, checkpointing=True)
        found += [device for device in same if plan.held_bytes <= device.usable_bytes]
    return [device.name for device in sorted(found, key=lambda device: device.total_bytes)]


def _useful(planner: Planner, lengths: Lengths, sizes: list[int]) -> list[int]:
    """Sizes without those that only take memory: above so many tokens a pass is no faster.

    More passes compute what rows share more often, so that a step must not grow by more than a little.
    """
    enough = ENOUGH_TOKENS[planner.device.kind]
    whole = lengths.tokens(sizes[0], share=planner.step.shares)
    shared = lengths.shared if planner.step.shares else 0
    useful = [sizes[0]]
    for size in sizes[1:]:
        again = (sizes[0] // size - 1) * shared
        tokens = lengths.tokens(size, share=planner.step.shares)
        if tokens < enough or again > MORE_TOKENS_FRAC * whole:
            break
        useful.append(size)
    return sizes[len(useful) - 1 :]


def _largest(
    planner: Planner,
    lengths: Lengths,
    sizes: list[int],
    checkpointing: bool,
    recompute: int | None = None,
) -> TrainPlan:
    """The plan of the largest size that fits, else that of the smallest; bytes grow with the size."""

    def planned(size: int) -> TrainPlan:
        return planner.train(lengths, size, checkpointing=checkpointing, recompute=recompute)

    low, high = 0, len(sizes) - 1  # the largest is tried first: it is what most runs want
    best = planned(sizes[0])
    if planner.fits(best) or high == 0:
        return best
    low, best = 1, planned(sizes[high])
    if not planner.fits(best):
        return best
    while low < high:
        middle = (low + high) // 2
        plan = planned(sizes[middle])
        if planner.fits(plan):
            best, high = plan, middle
        else:
            low = middle + 1
    return best


def _harder(run: Run, lengths: Lengths, device: Device) -> Iterator[dict[str, Any]]:
    """Changes that alter the run, each with those before it."""
    changes: dict[str, Any] = {}
    if run.adapter.init in ("pissa", "olora"):
        pass  # these rewrite the base, which must be fp32 for that
    elif run.model.precision not in FOUR_BIT and keeps_training(Path(run.model.name), "nf4"):
        changes["model.precision"] = "nf4"
        yield dict(changes)
    elif run.model.precision in FOUR_BIT and not run.model.double_quant:
        changes["model.double_quant"] = True
        yield dict(changes)
    if "8bit" not in run.train.optimizer and run.train.optimizer not in ("adafactor", "sgd"):
        eight = "paged_adamw_8bit" if device.kind == "cuda" else "adamw_8bit"
        changes["train.optimizer"] = eight
        yield dict(changes)
    for rank in RANKS:
        if rank < run.adapter.r:
            changes["adapter.r"] = rank
            share = rank / run.adapter.r
            scale = math.sqrt(share) if run.adapter.rslora else share
            changes["adapter.alpha"] = run.adapter.alpha * scale  # so that the scale stays the same
            yield dict(changes)
    longest = lengths.rows[0][0]
    while longest // 2 >= SHORTEST:
        longest //= 2
        changes["data.max_length"] = longest
        yield dict(changes)


def _changed(run: Run, changes: dict[str, Any]) -> Run:
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        part = getattr(run, section).model_copy(update={key: value})
        run = run.model_copy(update={section: part})
    return run


def _suggestion(planner: Planner, plan: TrainPlan, changes: dict[str, Any]) -> Suggestion:
    costs = [COSTS[key].format(value) for key, value in changes.items() if key in COSTS]
    some = plan.shape.recompute
    recompute = RECOMPUTE if some is None else RECOMPUTE_SOME.format(some, planner.num_layers)
    costs.append(recompute if plan.checkpointing else SMALLER_BATCH)
    return Suggestion(
        override_line(plan, changes), "; ".join(costs), plan, planner.margin_bytes(plan)
    )


def override_line(plan: TrainPlan, changes: dict[str, Any] | None = None) -> str:
    """The settings of a plan as overrides to paste."""
    parts = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in (changes or {}).items()
    ]
    parts.append(f"train.micro_batch_size={plan.micro_batch_size}")
    parts.append(f"train.checkpointing={plan.recompute}")
    return " ".join(parts)
