"""The sum of a plan: terms that add up, optimizers' states to the byte, the compute dtype of a card."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, Trainer
from trl import SFTConfig

from halfbyte.config import model_run
from halfbyte.config.schema import Adapter, Optimizer, Run
from halfbyte.errors import PlanError
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_config, load_model
from halfbyte.model.precision import Compute, choose_compute
from halfbyte.model.resolve import resolve_base
from halfbyte.plan.devices import DEVICES, find_device
from halfbyte.plan.memory import (
    MAP_BYTES,
    NUM_MAPS,
    OPTIMIZER_STEP,
    SLACK_FRAC,
    SMALL_STATE,
    Planner,
    compute_dtype,
    state_bytes,
)
from halfbyte.plan.phases import PHASES
from halfbyte.plan.shape import Lengths, StepShape

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
LENGTHS = Lengths.all_of(40, 16)
CPU = find_device("cpu-16")


def tiny_run(*overrides: str) -> Run:
    return model_run("org/tiny", list(overrides))


@pytest.fixture(scope="module")
def config() -> PretrainedConfig:
    found: PretrainedConfig = AutoConfig.for_model(
        "llama",
        vocab_size=480,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return found


@pytest.fixture(scope="module")
def planner(config: PretrainedConfig) -> Planner:
    return Planner(tiny_run("model.compute_dtype=fp32"), config, CPU)


def with_run(planner: Planner, *overrides: str, device: Any = CPU) -> Planner:
    """Another run of the same model: what was traced is kept."""
    run = tiny_run("model.compute_dtype=fp32", *overrides)
    return Planner(run, planner.config, device, planner.step)


def real_states(optimizer: str, parameters: list[nn.Parameter], folder: Path) -> int:
    """Bytes of the tensors that an optimizer keeps after a step, as transformers makes it."""
    arguments = SFTConfig(output_dir=str(folder), optim=optimizer, use_cpu=True, report_to=[])
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    real = optimizer_class(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    found = [value for state in real.state.values() for value in state.values()]
    storages = [value.untyped_storage() for value in found if isinstance(value, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_bytes_are_those_of_the_real_optimizer(tmp_path: Path, optimizer: Optimizer) -> None:
    """For matrices below, at and above what bitsandbytes keeps in fp32, and in no whole blocks."""
    shapes = [(4, 64), (63, 65), (64, 64), (64, 65), (16, 333), (8,)]
    for shape in shapes:
        real = real_states(optimizer, [nn.Parameter(torch.ones(shape))], tmp_path)
        tables = MAP_BYTES * NUM_MAPS.get(optimizer, 1) if "8bit" in optimizer else 0
        shared = tables if math.prod(shape) >= SMALL_STATE else 0
        assert state_bytes(optimizer, shape) + shared == real, shape


@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
def test_plan_counts_the_states_of_a_whole_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    """Matrices of both sorts, and the tables of 8-bit codes once."""
    base = resolve_base(str(tiny_llama))
    compute = Compute(torch.device("cpu"), torch.float32, "test")
    adapter = Adapter(r=64)
    model = attach_adapter(load_model(base, "nf4", compute=compute), adapter, 0, tmp_path)
    real = list(trainable_parameters(model).values())
    assert {parameter.numel() >= SMALL_STATE for parameter in real} == {True, False}
    planner = Planner(tiny_run("adapter.r=64"), load_config(base), CPU)
    for optimizer in OPTIMIZERS:
        other = with_run(planner, f"train.optimizer={optimizer}", "adapter.r=64")
        assert other.fixed_bytes()["optimizer"] == real_states(optimizer, real, tmp_path), optimizer


def test_paged_states_may_leave_a_card_but_not_the_ram(planner: Planner) -> None:
    plain = with_run(planner, "train.optimizer=adamw_8bit").fixed_bytes()["optimizer"]
    paged = with_run(planner, "train.optimizer=paged_adamw_8bit")
    assert (paged.fixed_bytes()["optimizer"], paged.paged_bytes()) == (plain, 0)
    on_card = with_run(planner, "train.optimizer=paged_adamw_8bit", device=DEVICES["t4"])
    assert (on_card.fixed_bytes()["optimizer"], on_card.paged_bytes()) == (0, plain)
    here = with_run(planner, "train.optimizer=adamw_8bit", device=DEVICES["t4"])
    assert (here.fixed_bytes()["optimizer"], here.paged_bytes()) == (plain, 0)
    plan = on_card.train(LENGTHS, 2, checkpointing=False)
    assert plan.paged_bytes == plain
    assert plan.terms["optimizer"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu-16", "t4"])
def test_plan_s_terms_are_its_peak(planner: Planner, device: str, checkpointing: bool) -> None:
    other = with_run(planner, device=find_device(device))
    plan = other.train(LENGTHS, 2, checkpointing=checkpointing)
    assert plan.peak_bytes == sum(plan.terms.values()) == max(plan.phases.values())
    assert plan.phases[plan.when] == plan.peak_bytes
    assert set(plan.phases) == {*PHASES, OPTIMIZER_STEP}
    assert all(plan.largest[name] >= size >= 0 for name, size in plan.terms.items())
    fixed = sum(other.fixed_bytes().values())
    assert plan.slack_bytes == int(SLACK_FRAC[other.device.kind] * (plan.peak_bytes - fixed))
    assert plan.context_bytes == other.device.context_bytes
    assert plan.needed_bytes == plan.peak_bytes + plan.context_bytes + plan.slack_bytes
    margin = other.device.total_bytes - plan.needed_bytes
    assert other.margin_bytes(plan) == margin
    assert other.fits(plan)
    terms = other.fixed_bytes()
    assert (terms["weights"], terms["constants"]) == (
        other.stored.reported_bytes,
        other.stored.constants_bytes,
    )
    assert terms["adapter"] == 4 * other.step.num_trainable == 4 * plan.num_trainable
    assert terms["workspace"] == other.device.workspace_bytes
    report = plan.as_json()
    assert report["predicted_peak_bytes"] == plan.peak_bytes
    assert report["terms"] == plan.terms
    assert f"2 rows × 8 passes per step, checkpointing {'on' if checkpointing else 'off'}" in (
        plan.summary()
    )


def test_fit_goes_down_to_the_last_byte(planner: Planner) -> None:
    plan = planner.train(LENGTHS, 2, checkpointing=False)
    for spare in (0, -1):
        tight = dataclasses.replace(
            CPU, total_bytes=plan.needed_bytes + 5000 + spare, in_use_bytes=5000
        )
        other = with_run(planner, device=tight)
        assert other.margin_bytes(plan) == spare
        assert other.fits(plan) == (spare == 0)
    weights = planner.stored.true_bytes + CPU.context_bytes
    for spare in (0, -1):
        tight = dataclasses.replace(CPU, total_bytes=weights + spare)
        assert with_run(planner, device=tight).loads == (spare == 0)


def test_listed_adamw_on_a_card_holds_a_denominator_for_every_weight(planner: Planner) -> None:
    gradients = 4 * planner.step.num_trainable
    rows = Lengths.all_of(2, 16)  # so short that the optimizer has the peak
    for optimizer, device, working in (
        ("adamw_torch", DEVICES["t4"], gradients),
        ("adamw_torch_fused", DEVICES["t4"], 0),
        ("adamw_torch", CPU, 0),
    ):
        other = with_run(planner, f"train.optimizer={optimizer}", device=device)
        plan = other.train(rows, 1, checkpointing=True)
        fixed = sum(other.fixed_bytes().values())
        assert plan.phases[OPTIMIZER_STEP] == fixed + gradients + working
        if working:
            assert plan.when == OPTIMIZER_STEP
            assert (plan.terms["gradients"], plan.terms["working_set"]) == (gradients, gradients)


def test_accumulation_is_counted_where_a_step_has_more_than_one_pass(planner: Planner) -> None:
    gradients = 4 * planner.step.num_trainable
    many = planner.train(LENGTHS, 8, checkpointing=False)
    one = planner.train(LENGTHS, 16, checkpointing=False)
    assert (many.accumulation, one.accumulation) == (2, 1)
    assert many.terms["gradients"] == gradients > one.terms["gradients"]
    assert many.shape.accumulates
    assert not one.shape.accumulates
    assert many.shape.alone() == dataclasses.replace(many.shape, accumulates=False)


def test_processes_share_the_ram_but_not_the_cards(
    monkeypatch: pytest.MonkeyPatch, planner: Planner
) -> None:
    alone = planner.train(LENGTHS, 2, checkpointing=False)
    alone_on_card = with_run(planner, device=DEVICES["t4"]).train(LENGTHS, 2, checkpointing=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    twice, on_card = with_run(planner), with_run(planner, device=DEVICES["t4"])
    plan = twice.train(LENGTHS, 2, checkpointing=False)
    buckets = 4 * planner.step.num_trainable  # DDP's
    assert (alone.accumulation, plan.accumulation) == (8, 4)
    assert plan.peak_bytes == alone.peak_bytes + buckets
    assert twice.margin_bytes(plan) == CPU.total_bytes - 2 * plan.needed_bytes
    on_card_plan = on_card.train(LENGTHS, 2, checkpointing=False)
    assert on_card_plan.peak_bytes == alone_on_card.peak_bytes + buckets
    margin = DEVICES["t4"].total_bytes - on_card_plan.needed_bytes
    assert on_card.margin_bytes(on_card_plan) == margin


def test_lengths_give_the_largest_micro_batch() -> None:
    lengths = Lengths(((50, 10), (40, 30), (30, 5)))
    first = lengths.shape(2, checkpointing=True, accumulates=False, share=True)
    assert first == StepShape((50, 40), 0, 40, True, False)
    # Never more rows than there are, and a label at least.
    every = lengths.shape(8, checkpointing=False, accumulates=True, share=True)
    assert every == StepShape((50, 40, 30), 0, 45, False, True)
    unlabelled = Lengths(((9, 0),)).shape(1, checkpointing=False, accumulates=False, share=True)
    assert unlabelled.num_labels == 1
    assert lengths.at_most(35).rows == ((35, 10), (35, 30), (30, 5))
    assert lengths.at_most(8).rows == ((8, 7), (8, 7), (8, 5))
    assert Lengths.all_of(7, 2).rows == ((7, 6), (7, 6))


def test_planner_takes_over_a_step_and_traces_none_before_it_is_asked(planner: Planner) -> None:
    fresh = Planner(tiny_run("model.compute_dtype=fp32"), planner.config, CPU)
    assert fresh.loads
    assert "step" not in vars(fresh)
    assert with_run(planner).step is planner.step


@pytest.mark.parametrize(
    ("device", "overrides", "wanted"),
    [
        ("t4", [], torch.float16),  # until real rows say otherwise
        ("t4", ["model.precision=fp32"], torch.float32),
        ("rtx4090", [], torch.bfloat16),
        ("rtx4090", ["model.compute_dtype=fp32"], torch.float32),
        ("t4", ["model.compute_dtype=fp16"], torch.float16),
        ("rtx4090", ["model.precision=fp16"], torch.float16),
        ("cpu-16", ["model.compute_dtype=bf16"], torch.bfloat16),
        ("cpu-16", ["model.precision=bf16"], torch.bfloat16),
        ("cpu-16", ["model.precision=fp32"], torch.float32),
    ],
)
def test_compute_dtype_is_the_device_s(
    device: str, overrides: list[str], wanted: torch.dtype
) -> None:
    assert compute_dtype(tiny_run(*overrides), find_device(device)) == wanted


@pytest.mark.parametrize("key", ["model.compute_dtype", "model.precision"])
def test_compute_dtype_refuses_bf16_where_it_is_emulated(key: str) -> None:
    with pytest.raises(PlanError, match=r"Tesla T4 only emulates bf16.*fp32 or fp16") as error:
        compute_dtype(tiny_run(f"{key}=bf16"), find_device("t4"))
    assert error.value.exit_code == 2


def test_compute_dtype_is_measured_on_the_cpu_as_the_load_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bf16_s, wanted in ((0.5, torch.bfloat16), (2.0, torch.float32)):
        times = {torch.float32: 1.0, torch.bfloat16: bf16_s}
        monkeypatch.setattr("halfbyte.model.precision.gemm_seconds", times.__getitem__)
        assert compute_dtype(tiny_run(), CPU) == wanted
        assert choose_compute("auto", torch.device("cpu")).dtype == wanted
