"""Owns the question whether weights and optimizer states are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from halfbyte.errors import RunError
from halfbyte.kernels.operators import uses_operators


def all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return whether all values are finite, as a tensor () on the device of the first, which is not waited for."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor.detach())
    first, *others = (_finite(values) for values in by_device.values())
    for other in others:  # AdamW counts its steps on the CPU
        first = first & other.to(first.device, non_blocking=True)
    return first


def _finite(values: list[torch.Tensor]) -> torch.Tensor:
    if not uses_operators(values[0].device):
        # A sum is NaN or infinite if a value is, and takes an eighth of the time that a largest value takes here.
        figures = [value.sum() for value in values]
    else:
        figures = list(torch._foreach_norm(values, math.inf))
    return torch.isfinite(torch.stack(figures)).all()


def check_finite(step: int, weights: Iterable[torch.Tensor], optimizer: Any) -> None:
    """Check that weights and optimizer states are finite, before they are saved.

    Raises:
        RunError: one of them is NaN or infinite.
    """
    parts = {
        "the adapter's weights": [*weights],
        "the optimizer's states": optimizer_states(optimizer),
    }
    if all_finite(tensor for tensors in parts.values() for tensor in tensors):
        return
    for what, tensors in parts.items():
        num_bad = sum(not bool(torch.isfinite(tensor).all()) for tensor in tensors)
        if num_bad:
            raise RunError(
                f"step {step}: {num_bad} of {what} hold NaN or infinity; nothing of this step is saved, and the"
                " newest checkpoint is from before it"
            )


def optimizer_states(optimizer: Any) -> list[torch.Tensor]:
    """Return the states of an optimizer that are floating point and not paged: those are the device's as well."""
    return list(_states(optimizer))


def _states(optimizer: Any) -> Iterator[torch.Tensor]:
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        for value in state.values():
            if not isinstance(value, torch.Tensor) or getattr(value, "is_paged", False):
                continue
            if value.is_floating_point():
                yield value
