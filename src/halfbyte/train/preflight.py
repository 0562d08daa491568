"""Owns the check before the first step: one real forward and backward pass must be finite everywhere."""

from __future__ import annotations

import math

import torch

from halfbyte.errors import RunError
from halfbyte.model.adapter import trainable_parameters
from halfbyte.train.diagnosis import broken_weight
from halfbyte.train.measure import Measured, measure
from halfbyte.train.trainer import TokenTrainer


def check_first_step(trainer: TokenTrainer, *, profiled: bool = True) -> tuple[float, Measured]:
    """Run one forward and backward pass on the longest micro-batch before training starts.

    The check changes neither weights nor random state. It returns the loss in nats per labelled token,
    and the memory that the two passes took, as measured by ``measure``.

    Raises:
        RunError: the loss or a gradient is not finite, or an adapter gets no gradient.
    """
    layout = trainer.cutting.layout(trainer.cutting.longest(trainer.rows))
    model = trainer.model
    if trainer.args.gradient_checkpointing:
        # transformers enables this only in train(); the check must not need more memory than training.
        model.get_base_model().gradient_checkpointing_enable(
            trainer.args.gradient_checkpointing_kwargs
        )
    value = math.nan

    def forward() -> torch.Tensor:
        nonlocal value
        with trainer.accelerator.autocast():  # as in training, where the model is wrapped in it
            total = model(layout=layout)
        loss: torch.Tensor = total / sum(layout.counts)
        value = float(loss.item())
        if not math.isfinite(value):
            raise RunError(f"before step 1: the loss on the longest rows is {value}: {_why(model)}")
        return loss

    with torch.random.fork_rng():
        model.train()
        measured = measure(trainer.args.device, forward, torch.autograd.backward, profiled=profiled)
    faults = []
    for name, parameter in trainable_parameters(model).items():
        gradient = parameter.grad
        if gradient is None:
            faults.append(f"{name}: no gradient")
        elif not torch.isfinite(gradient).all():
            faults.append(f"{name}: NaN or infinite gradient")
        elif "lora_B" in name and not gradient.abs().max() > 0:
            faults.append(f"{name}: the gradient is zero everywhere")
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if faults:
        raise RunError(
            f"before step 1: {len(faults)} adapter weights cannot learn: {'; '.join(faults[:3])}"
        )
    return value, measured


def _why(model: torch.nn.Module) -> str:
    """Return why the loss of a model is not finite."""
    name = broken_weight(model, trained=False)
    if name:
        return f"the base's weight {name} holds NaN or infinity; download the base again"
    return "activations overflow in the compute dtype; set model.compute_dtype=fp32"
