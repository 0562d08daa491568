"""The sum of a plan: terms that add up, optimizers' states to the byte, the compute dtype of a card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, Trainer
from trl import SFTConfig

from halfbyte.config import model_run
from halfbyte.config.schema import Optimizer, Run
from halfbyte.errors import PlanError
from halfbyte.model.footprint import stored_tensors
from halfbyte.model.load import load_config
from halfbyte.model.precision import choose_compute
from halfbyte.model.resolve import resolve_base
from halfbyte.plan.devices import DEVICES, find_device
from halfbyte.plan.memory import (
    OPTIMIZER_STEP,
    SLACK_FRAC,
    Lengths,
    Planner,
    TrainPlan,
    compute_dtype,
    state_bytes,
)
from halfbyte.plan.step import PHASES, Shape

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
    """Bytes of all tensors that an optimizer keeps after a step, as transformers makes it."""
    arguments = SFTConfig(output_dir=str(folder), optim=optimizer, use_cpu=True, report_to=[])
    made_by, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    real = made_by(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    storages: dict[int, int] = {}
    for state in real.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif optimizer == "adafactor" and isinstance(tensor, int | float):
                storages[id(tensor) + len(storages)] = 4
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_bytes_are_those_of_the_real_optimizer(
    config: PretrainedConfig, planner: Planner, tmp_path: Path, optimizer: Optimizer
) -> None:
    """Of matrices below, at and above what bitsandbytes keeps in fp32, and not in whole blocks."""
    shapes = [(4, 64), (63, 65), (64, 64), (64, 65), (16, 333), (8,)]
    for shape in shapes:
        one = real_states(optimizer, [nn.Parameter(torch.ones(shape))], tmp_path)
        tables = one - state_bytes(optimizer, shape)
        assert tables == 0
