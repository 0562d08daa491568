"""Owns the gated linear unit act(gate)·up (arXiv 2002.05202 §2).

d(up) = dy·act(gate), and d(gate) = dy·up·act'(gate).

Shapes: … any leading dimensions, F features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu_tanh"]


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(gate)·up (…, F)."""
    return _activate(gate, activation).mul_(up)


def glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients (…, F) of gate and up; the activation is computed again."""
    dup = _activate(gate, activation).mul_(dy)
    dact = dy * up
    # Private operators, tried with torch 2.13: each computes dact·act'(gate) in one pass over memory,
    # where public functions take several. Can go when torch has a public function for it.
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dact, gate)
    else:
        dgate = torch.ops.aten.gelu_backward(dact, gate, approximate="tanh")
    return dgate, dup


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh")
