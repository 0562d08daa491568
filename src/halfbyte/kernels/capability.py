"""Owns the compute capability that passes are computed for: that of the device, a set one, or a planned one."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from halfbyte.errors import ModelError

SETTING = (
    "HALFBYTE_CAPABILITY"  # such as 7.5: computes as on that card, also on newer ones and on a CPU
)
Capability = tuple[int, int]
TURING, AMPERE = (7, 5), (8, 0)  # AMPERE is the first with bf16 and flash attention

_planned: list[Capability] = []  # not by thread: autograd computes backward passes in others


def capability_of(device: torch.device) -> Capability | None:
    """Return the compute capability that passes on a device are computed for; None: as on a CPU.

    Raises:
        ModelError: ``HALFBYTE_CAPABILITY`` is no compute capability, or higher than that of the device.
    """
    if _planned:
        return _planned[-1]
    forced = os.environ.get(SETTING)
    return _found(device, forced)


@functools.cache
def _found(device: torch.device, forced: str | None) -> Capability | None:
    if device.type != "cuda":
        return _parsed(forced) if forced else None
    real = torch.cuda.get_device_capability(device)
    if not forced:
        return real
    if _parsed(forced) > real:
        raise ModelError(
            f"{SETTING} is {forced}, but {device} has compute capability {real[0]}.{real[1]}; an older"
            " one can be set, not a newer one"
        )
    return _parsed(forced)


def _parsed(text: str) -> Capability:
    parts = text.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ModelError(f"{SETTING} is {text!r}; allowed: a compute capability such as 7.5")
    return int(parts[0]), int(parts[1])


def is_planned() -> bool:
    """Whether passes are planned now, on tensors without data."""
    return bool(_planned)


@contextmanager
def planned_for(capability: Capability | None) -> Iterator[None]:
    """Compute as on a card of this capability, whatever the device: for tensors without data."""
    if capability is None:
        yield
        return
    _planned.append(capability)
    try:
        yield
    finally:
        _planned.pop()
