"""Advice: the largest micro-batch that fits, and changes that are needed, enough and no more."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from transformers import AutoConfig, PretrainedConfig

from halfbyte.config import model_run
from halfbyte.config.schema import Run
from halfbyte.errors import PlanError
from halfbyte.plan.advice import (
    ENOUGH_TOKENS,
    RECOMPUTE,
    SMALLER_BATCH,
    Suggestion,
    cards_that_fit,
    choose,
    micro_batches,
    models_that_fit,
    override_line,
    suggest,
)
from halfbyte.plan.catalogue import known_models, model_config
from halfbyte.plan.devices import DEVICES, Device, find_device
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.shape import Lengths

LENGTHS = Lengths.all_of(512, 16)
FIXED = ("model.compute_dtype=fp32", "adapter.targets=[up_proj, down_proj]")
HUNGRY = ("train.micro_batch_size=16", "train.checkpointing=off")


def tiny_run(*overrides: str) -> Run:
    return model_run("org/tiny", [*FIXED, *overrides])


def device_with(total_bytes: int) -> Device:
    return replace(find_device("cpu-16"), total_bytes=total_bytes, context_bytes=0)


ROOMY = device_with(1 << 40)


@pytest.fixture(scope="module")
def config() -> PretrainedConfig:
    found: PretrainedConfig = AutoConfig.for_model(
        "llama",
        vocab_size=480,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return found


@pytest.fixture(scope="module")
def planners(config: PretrainedConfig) -> Planners:
    return Planners(config)


@pytest.fixture
def all_sizes_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model's passes be small however many rows they have."""
    for kind in ENOUGH_TOKENS:
        monkeypatch.setitem(ENOUGH_TOKENS, kind, 1 << 30)


class Planners:
    """Planners of one model; a traced step serves all runs that share it."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.known: dict[str, Planner] = {}

    def of(self, run: Run, device: Device) -> Planner:
        """A planner of this run on this device."""
        key = f"{run.model} {run.adapter}"
        if key not in self.known:
            self.known[key] = Planner(run, self.config, ROOMY)
        return Planner(run, self.config, device, self.known[key].step)

    def need(self, run: Run, rows: int, checkpointing: bool, length: int = 512) -> int:
        """Bytes that a device must have for these settings."""
        plan = self.of(run, ROOMY).train(LENGTHS.at_most(length), rows, checkpointing=checkpointing)
        return plan.needed_bytes

    def suggest(self, run: Run, device: Device) -> list[Suggestion]:
        """What is suggested for this run on this device."""
        return suggest(run, self.config, device, LENGTHS, self.of(run, device))

    def applied(self, run_overrides: tuple[str, ...], line: str, device: Device) -> bool:
        """Whether a run with these overrides pasted behind its own fits, planned anew."""
        overrides = parsed(" ".join((*run_overrides, line)))
        run = tiny_run(*(f"{key}={value}" for key, value in overrides.items()))
        planner = self.of(run, device)
        plan = choose(planner, LENGTHS.at_most(run.data.max_length))
        return planner.loads and planner.fits(plan)


def parsed(line: str) -> dict[str, str]:
    """Overrides by key."""
    return dict(part.split("=") for part in line.split())


def settings(plan: TrainPlan) -> tuple[int, bool]:
    return plan.micro_batch_size, plan.checkpointing


def test_micro_batches_divide_the_step_the_largest_first() -> None:
    assert micro_batches(12) == [12, 6, 4, 3, 2, 1]
    assert micro_batches(1) == [1]
    assert micro_batches(7) == [7, 1]


def test_choose_takes_no_more_rows_than_make_a_pass_faster(planners: Planners) -> None:
    run = tiny_run()
    assert settings(choose(planners.of(run, ROOMY), LENGTHS)) == (2, False)  # 1,022 tokens
    short = Lengths.all_of(65, 16)
    assert settings(choose(planners.of(run, ROOMY), short)) == (8, False)  # 512
    # Ragged rows: what counts is the tokens of a pass, not how much longer the longest are.
    ragged = Lengths(tuple((tokens, 8) for tokens in (600, 500, *[30] * 14)))
    assert settings(choose(planners.of(run, ROOMY), ragged)) == (1, False)
    # A common beginning is computed once in each pass: more passes cost more than they save.
    stem = Lengths(short.rows, shared=40)
    assert settings(choose(planners.of(run, ROOMY), stem)) == (16, False)


@pytest.mark.usefixtures("all_sizes_help")
@pytest.mark.parametrize("rows", [16, 8, 4, 2, 1])
def test_choose_takes_the_largest_micro_batch_that_fits(planners: Planners, rows: int) -> None:
    run = tiny_run()
    room = planners.need(run, rows, False)
    assert settings(choose(planners.of(run, device_with(room)), LENGTHS)) == (rows, False)
    tight = choose(planners.of(run, device_with(room - 1)), LENGTHS)
    if rows > 1:
        assert settings(tight) == (rows // 2, False)
    else:  # recomputation comes last, and then with as many rows as it allows
        assert tight.checkpointing
        assert planners.need(run, tight.micro_batch_size, True) < room
        assert planners.need(run, 2 * tight.micro_batch_size, True) > room - 1


def test_choose_recomputes_as_few_layers_as_fit(config: PretrainedConfig) -> None:
    deep = copy.deepcopy(config)
    deep.num_hidden_layers = 8
    planners = Planners(deep)
    run = tiny_run("train.micro_batch_size=4")
    off, on = planners.need(run, 4, False), planners.need(run, 4, True)
    planner = planners.of(run, device_with((off + on) // 2))
    plan = choose(planner, LENGTHS)
    layers = plan.shape.recompute
    assert layers is not None
    assert 0 < layers < planner.num_layers
    assert planner.fits(plan)
    fewer = planner.train(LENGTHS, 4, checkpointing=layers > 1, recompute=layers - 1)
    assert not planner.fits(fewer)
    assert override_line(plan) == f"train.micro_batch_size=4 train.checkpointing={layers}"
    assert f"checkpointing on {layers} layers" in plan.summary()
    pasted = tiny_run(*override_line(plan).split())
    assert choose(planners.of(pasted, ROOMY), LENGTHS).peak_bytes == plan.peak_bytes


def test_more_layers_than_there_are_cannot_be_recomputed(planners: Planners) -> None:
    run = tiny_run("train.checkpointing=99")
    with pytest.raises(
        PlanError, match=r"checkpointing is 99, but the model has \d+ layers; allowed"
    ):
        choose(planners.of(run, ROOMY), LENGTHS)


@pytest.mark.usefixtures("all_sizes_help")
def test_choose_keeps_what_is_not_auto(planners: Planners) -> None:
    run = tiny_run("train.micro_batch_size=4")
    off, on = planners.need(run, 4, False), planners.need(run, 4, True)
    assert on < off
    for room, wanted in ((off, False), (off - 1, True), (on - 1, True)):
        plan = choose(planners.of(run, device_with(room)), LENGTHS)
        assert settings(plan) == (4, wanted)
    never = tiny_run("train.checkpointing=off")
    plan = choose(planners.of(never, device_with(planners.need(run, 1, False) - 1)), LENGTHS)
    assert settings(plan) == (1, False)
    always = tiny_run("train.checkpointing=on")
    assert settings(choose(planners.of(always, ROOMY), LENGTHS)) == (16, True)


def test_choose_takes_the_least_hungry_where_nothing_fits(planners: Planners) -> None:
    run = tiny_run()
    for room in (planners.need(run, 1, True) - 1, 1000):
        planner = planners.of(run, device_with(room))
        plan = choose(planner, LENGTHS)
        assert settings(plan) == (1, True)
        assert not planner.fits(plan)


def test_suggest_changes_only_how_the_step_is_cut_where_that_is_enough(planners: Planners) -> None:
    run = tiny_run(*HUNGRY)
    room = max(planners.need(run, 4, False), planners.need(run, 8, True))
    assert room < min(planners.need(run, 8, False), planners.need(run, 16, True))
    device = device_with(room)
    found = planners.suggest(run, device)
    assert [settings(one.plan) for one in found] == [(4, False), (8, True)]
    assert [one.costs for one in found] == [SMALLER_BATCH, RECOMPUTE]
    for one in found:
        assert one.override == override_line(one.plan)
        assert planners.applied(HUNGRY, one.override, device)
        assert one.margin_bytes == device.total_bytes - one.plan.needed_bytes >= 0
    assert found[0].override == "train.micro_batch_size=4 train.checkpointing=off"
    tighter = device_with(planners.need(run, 1, False) - 1)
    (one,) = planners.suggest(run, tighter)
    assert one.plan.checkpointing
    assert planners.applied(HUNGRY, one.override, tighter)


def rooms(planners: Planners) -> Iterator[tuple[str, int, str]]:
    """What a run asks for, a room that is just enough for some changes, and those."""
    eight = "train.optimizer=adamw_8bit"
    plain, small = tiny_run(eight), tiny_run(eight, "adapter.r=8")
    whole = tiny_run("model.precision=fp32")
    assert planners.need(tiny_run(), 1, True) < planners.need(whole, 1, True)
    yield "model.precision=fp32", planners.need(tiny_run(), 1, True), "model.precision"
    yield "model.precision=nf4", planners.need(plain, 1, True), "train.optimizer"
    single = tiny_run("model.double_quant=false")
    assert planners.need(tiny_run(), 1, True) < planners.need(single, 1, True)
    yield "model.double_quant=false", planners.need(tiny_run(), 1, True), "model.double_quant"
    yield "adapter.r=64", planners.need(tiny_run("adapter.r=8"), 1, True), "adapter.r"
    yield "adapter.r=8", planners.need(small, 1, True, 256), "data.max_length"


@pytest.mark.parametrize(
    "index", [0, 1, 2, *(pytest.param(one, marks=pytest.mark.slow) for one in (3, 4))]
)
def test_suggest_finds_what_is_needed_and_leaves_out_the_rest(
    planners: Planners, index: int
) -> None:
    override, room, wanted = next(itertools.islice(rooms(planners), index, None))
    overrides = (*HUNGRY, override)
    device = device_with(room)
    (one,) = planners.suggest(tiny_run(*overrides), device)
    overridden = parsed(one.override)
    assert overridden.pop("train.checkpointing") == "on"
    assert overridden.pop("train.micro_batch_size") == str(one.plan.micro_batch_size)
    scale = overridden.pop("adapter.alpha", None)  # goes with the rank
    assert (scale is not None) == ("adapter.r" in overridden)
    assert planners.applied(overrides, one.override, device)
    assert wanted in overridden
    assert one.costs.endswith(RECOMPUTE)
    assert len(one.costs.split("; ")) == len(overridden) + 1
    least = "train.micro_batch_size=1 train.checkpointing=on"
    for change in overridden:
        fewer = " ".join(f"{key}={value}" for key, value in overridden.items() if key != change)
        assert not planners.applied(overrides, f"{fewer} {least}", device), change
    more = one.override.replace(
        f"micro_batch_size={one.plan.micro_batch_size}",
        f"micro_batch_size={2 * one.plan.micro_batch_size}",
    )
    assert one.plan.micro_batch_size == 16 or not planners.applied(overrides, more, device)


def test_suggest_pages_the_optimizer_on_a_card(planners: Planners) -> None:
    run = tiny_run(*HUNGRY)
    card = replace(find_device("rtx3060"), context_bytes=0, workspace_bytes=0)
    paged = tiny_run("train.optimizer=paged_adamw_8bit")
    plan = planners.of(paged, card).train(LENGTHS, 1, checkpointing=True)
    (one,) = planners.suggest(run, replace(card, total_bytes=plan.needed_bytes))
    assert "train.optimizer=paged_adamw_8bit " in one.override


@pytest.mark.slow
def test_suggest_says_nothing_where_nothing_helps(planners: Planners) -> None:
    least = tiny_run("adapter.r=4", "train.optimizer=adamw_8bit")
    room = planners.need(least, 1, True, 128)
    (one,) = planners.suggest(tiny_run(*HUNGRY), device_with(room))
    found = parsed(one.override)
    assert (found["adapter.r"], found["data.max_length"]) == ("4", "128")
    assert "train.optimizer" not in found  # so small an adapter has no states in 8 bits
    assert planners.suggest(tiny_run(*HUNGRY), device_with(room - 1)) == []
    assert planners.suggest(tiny_run(*HUNGRY), device_with(1000)) == []


def test_models_that_fit_are_those_of_the_table_the_largest_first() -> None:
    t4 = find_device("t4")
    names = models_that_fit(t4, "fp32")
    training = {known.names[0]: known.training for known in known_models()}
    sizes = {known.names[0]: known.parameters for known in known_models()}
    found = [name.split(" (")[0] for name in names]
    assert found == sorted(found, key=lambda name: -sizes[name])
    assert set(found) == {n for n in training if training[n]["fp32"] <= t4.usable_bytes}
    assert "google/gemma-3-12b-it (12.2 B)" in names
    assert "meta-llama/Llama-3.1-70B" not in " ".join(names)
    assert models_that_fit(device_with(1000), "fp32") == []
    llama = training["meta-llama/Llama-3.1-70B"]
    assert llama["bf16"] < llama["fp32"]
    between = device_with(llama["bf16"])
    assert "Llama-3.1-70B" in models_that_fit(between, "bf16")[0]
    assert "Llama-3.1-70B" not in models_that_fit(between, "fp32")[0]


def test_suggested_rank_keeps_the_adapter_s_scale(planners: Planners) -> None:
    """alpha/r is what the learning rate was chosen for."""
    room = planners.need(tiny_run("adapter.r=8"), 1, True)
    run = tiny_run(*HUNGRY, "adapter.r=64", "adapter.alpha=128")
    (one,) = planners.suggest(run, device_with(room))
    changed = tiny_run(*one.override.split()).adapter
    assert changed.r < 64
    assert changed.alpha / changed.r == 2


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["model.compute_dtype=bf16"]], ids=["auto", "bf16"])
def test_cards_that_fit_come_smallest_first(overrides: list[str]) -> None:
    """Where bf16 is asked for, cards without it are out, and none of them ends the plan."""
    config, _ = model_config("meta-llama/Llama-3.1-8B")
    run = model_run("meta-llama/Llama-3.1-8B", overrides)
    lengths = Lengths.all_of(512, 16)
    found = cards_that_fit(run, config, lengths)
    cards = [DEVICES[name] for name in found]
    assert cards == sorted(cards, key=lambda card: card.total_bytes)
    assert {"rtx3060", "rtx4090", "h200"} <= set(found)
    assert "rtx2060" not in found
    assert ("t4" in found) == (not overrides)
    for name in ("rtx3050-8gb", "rtx3060"):
        planner = Planner(run, config, DEVICES[name])
        plan = planner.train(lengths, 1, checkpointing=True)
        assert planner.fits(plan) == (name in found)
    if overrides:
        with pytest.raises(PlanError):
            Planner(run, config, DEVICES["t4"])


def test_override_line_is_what_the_command_line_takes(planners: Planners) -> None:
    plan = planners.of(tiny_run(), ROOMY).train(LENGTHS, 2, checkpointing=True)
    line = override_line(plan, {"model.double_quant": True, "adapter.r": 4})
    assert line == (
        "model.double_quant=true adapter.r=4 train.micro_batch_size=2 train.checkpointing=on"
    )
    run = tiny_run(*line.split())
    assert (run.model.double_quant, run.adapter.r) == (True, 4)
    assert (run.train.micro_batch_size, run.train.checkpointing) == (2, "on")
    assert math.isclose(plan.accumulation, 8)
