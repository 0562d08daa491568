"""Owns norms and gated MLPs that keep less for the backward pass and make fewer passes over memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.config.schema import Speed
from halfbyte.forward.fused_lora import fuse_lora, make

PROBE_ROWS = 4
TOLERANCE = 1e-5
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
NORM_EPS = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm (arXiv 1910.07467 §4), in fp32 inside: x / sqrt(mean(x²) + eps) · weight.

    Attributes:
        weight: (D,) in fp32, frozen.
        eps: keeps rows of zeros finite.
    """

    weight: torch.Tensor
    eps: float

    def make(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The norm of x (…, D), in its dtype."""
        (x,) = inputs
        wide = x.float()
        normed: torch.Tensor = (wide * self._scale(wide)).mul_(self.weight).to(x.dtype)
        return normed

    def pull(self, gradient: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradient of x: s·(g·w − x·s²·mean(g·w·x)), s being 1 / sqrt(mean(x²) + eps)."""
        (x,) = inputs
        wide = x.float()
        scale = self._scale(wide)
        pull = gradient.float() * self.weight
        along = torch.linalg.vecdot(pull, wide)[..., None]
        along.mul_(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])
        return (pull.mul_(scale).addcmul_(wide, along).to(x.dtype),)

    def _scale(self, wide: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return norm.square_().div_(wide.shape[-1]).add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class Gate:
    """act(gate) · up (arXiv 2002.05202 §2); ``activation`` is ``silu`` or ``gelu_tanh``."""

    activation: str

    def make(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The product (…, F)."""
        gate, up = inputs
        return self._activate(gate).mul_(up)

    def pull(self, gradient: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of gate and up; the activation is computed again."""
        gate, up = inputs
        for_up = self._activate(gate).mul_(gradient)
        inner = gradient * up
        if self.activation == "silu":
            for_gate = torch.ops.aten.silu_backward(inner, gate)
        else:
            for_gate = torch.ops.aten.gelu_backward(inner, gate, approximate="tanh")
        return for_gate, for_up

    def _activate(self, gate: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return nn.functional.silu(gate)
        return nn.functional.gelu(gate, approximate="tanh")


def fuse(model: nn.Module, speed: Speed, *, probe: bool = True) -> None:
    """Put what ``speed`` allows in the place of PEFT's and transformers' own, in place."""
    if speed.fused_lora:
        fuse_lora(model)
    if speed.fused_layers:
        fuse_layers(model, probe=probe)


def fuse_layers(model: nn.Module, *, probe: bool = True) -> tuple[int, int]:
    """Put ``Norm`` and ``Gate`` in the place of a model's own, in place.

    Args:
        model: its norms and MLPs are found by their parts.
        probe: replace a kind of module only if it gives the same numbers; a model without data cannot
            be asked.

    Returns:
        how many norms and MLPs were replaced.
    """
    norms: list[Any] = [
        m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _eps(m)
    ]
    mlps: dict[Any, Gate] = {m: gate for m in model.modules() if (gate := _gate(m))}
    offsets = {kind: _norm_offset(norms, kind) if probe else 0.0 for kind in set(map(type, norms))}
    count = 0
    for norm in norms:
        offset = offsets[type(norm)]
        if offset is not None and not norm.weight.requires_grad:
            norm.forward = functools.partial(make, _norm(norm, offset))
            count += 1
    same = {kind: not probe or _mlp_is_gated(mlps, kind) for kind in set(map(type, mlps))}
    for mlp, gate in mlps.items():
        if same[type(mlp)]:
            mlp.forward = functools.partial(_mlp_forward, mlp, gate)
    return count, sum(same[type(mlp)] for mlp in mlps)


def _eps(module: Any) -> float | None:
    """What keeps a norm finite, if the module is one with a weight vector."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    return next((float(getattr(module, name)) for name in NORM_EPS if hasattr(module, name)), None)


def _norm(module: Any, offset: float) -> Norm:
    """The recipe of a norm that adds ``offset`` to its weight."""
    weight = module.weight.detach().float()
    return Norm(weight + offset if offset else weight, _eps(module) or 0.0)


@torch.no_grad()
def _norm_offset(norms: list[Any], kind: type[Any]) -> float | None:
    """What this kind of norm adds to its weight: 0, 1 (Gemma), or None if it is something else."""
    norm: Any = next(norm for norm in norms if type(norm) is kind)
    x = torch.randn(PROBE_ROWS, norm.weight.shape[0], device=norm.weight.device)
    wanted = norm(x)
    for offset in (0.0, 1.0):
        found = _norm(norm, offset).make(x)
        if torch.allclose(found, wanted.float(), rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _gate(module: Any) -> Gate | None:
    """The recipe of a gated MLP, if the module is one and its activation is known."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    activation = ACTIVATIONS.get(type(module.act_fn).__name__)
    return Gate(activation) if activation else None


def _mlp_forward(mlp: Any, gate: Gate, x: torch.Tensor) -> torch.Tensor:
    down: torch.Tensor = mlp.down_proj(make(gate, mlp.gate_proj(x), mlp.up_proj(x)))
    return down


@torch.no_grad()
def _mlp_is_gated(mlps: dict[Any, Gate], kind: type[Any]) -> bool:
    mlp, gate = next((mlp, gate) for mlp, gate in mlps.items() if type(mlp) is kind)
    device = next(mlp.parameters()).device
    x = torch.randn(PROBE_ROWS, mlp.gate_proj.in_features, device=device)
    return torch.allclose(_mlp_forward(mlp, gate, x), mlp(x), rtol=TOLERANCE, atol=TOLERANCE)
