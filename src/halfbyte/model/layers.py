"""Owns norms and gated MLPs that keep less for the backward pass and make fewer passes over memory."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from halfbyte.config.schema import Speed
from halfbyte.model.fused import fuse_lora

PROBE_ROWS = 4
TOLERANCE = 1e-5
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
NORM_EPS = ("variance_epsilon", "eps")


class RmsNorm(torch.autograd.Function):
    """Root-mean-square norm (arXiv 1910.07467 §4) with a frozen weight, in fp32 inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """X / sqrt(mean(x²) + eps) · weight over the last of its dimensions, in the dtype of x.

        Args:
            ctx: autograd's context.
            x: (…, D).
            weight: (D,) in fp32.
            eps: keeps rows of zeros finite.
        """
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: torch.Tensor = (wide * scale).mul_(weight).to(x.dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of x: s·(g·w − x·s²·mean(g·w·x))."""
        x, weight, scale = ctx.saved_tensors
        wide = x.float()
        pull = gradients[0].float() * weight
        along = torch.linalg.vecdot(pull, wide)[..., None]
        along.mul_(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])
        return pull.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class Gated(torch.autograd.Function):
    """act(gate) · up, from which only gate and up are kept (arXiv 2002.05202 §2)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """The product (…, F); ``activation`` is ``silu`` or ``gelu_tanh``."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of gate and up; the activation is computed again."""
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        for_up = _activate(gate, ctx.activation).mul_(gradient)
        inner = gradient * up
        if ctx.activation == "silu":
            for_gate = torch.ops.aten.silu_backward(inner, gate)
        else:
            for_gate = torch.ops.aten.gelu_backward(inner, gate, approximate="tanh")
        return for_gate, for_up, None


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate="tanh")


def fuse(model: nn.Module, speed: Speed, *, probe: bool = True) -> None:
    """Put what ``speed`` allows in the place of PEFT's and transformers' own, in place."""
    if speed.fused_lora:
        fuse_lora(model)
    if speed.fused_layers:
        fuse_layers(model, probe=probe)


def fuse_layers(model: nn.Module, *, probe: bool = True) -> tuple[int, int]:
    """Put ``RmsNorm`` and ``Gated`` in the place of a model's own, in place.

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
    mlps: list[Any] = [m for m in model.modules() if _gated_activation(m)]
    offsets = {kind: _norm_offset(norms, kind) if probe else 0.0 for kind in set(map(type, norms))}
    count = 0
    for norm in norms:
        offset = offsets[type(norm)]
        if offset is not None and not norm.weight.requires_grad:
            norm.forward = types.MethodType(_norm_forward(offset), norm)
            count += 1
    same = {kind: not probe or _mlp_is_gated(mlps, kind) for kind in set(map(type, mlps))}
    for mlp in mlps:
        if same[type(mlp)]:
            mlp.forward = types.MethodType(_mlp_forward, mlp)
    return count, sum(same[type(mlp)] for mlp in mlps)


def _eps(module: Any) -> float | None:
    """What keeps a norm finite, if the module is one with a weight vector."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    return next((float(getattr(module, name)) for name in NORM_EPS if hasattr(module, name)), None)


def _norm_forward(offset: float) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() + offset if offset else self.weight.float()
        normed: torch.Tensor = RmsNorm.apply(hidden_states, weight, _eps(self))  # type: ignore[no-untyped-call]
        return normed

    return forward


@torch.no_grad()
def _norm_offset(norms: list[Any], kind: type[Any]) -> float | None:
    """What this kind of norm adds to its weight: 0, 1 (Gemma), or None if it is something else."""
    norm: Any = next(norm for norm in norms if type(norm) is kind)
    x = torch.randn(PROBE_ROWS, norm.weight.shape[0], device=norm.weight.device)
    wanted = norm(x)
    for offset in (0.0, 1.0):
        found = _norm_forward(offset)(norm, x)
        if torch.allclose(found, wanted.float(), rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _gated_activation(module: Any) -> str | None:
    """The activation of a gated MLP, if the module is one and the activation is known."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    return ACTIVATIONS.get(type(module.act_fn).__name__)


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    activation = _gated_activation(self)
    product = Gated.apply(self.gate_proj(x), self.up_proj(x), activation)  # type: ignore[no-untyped-call]
    down: torch.Tensor = self.down_proj(product)
    return down


@torch.no_grad()
def _mlp_is_gated(mlps: list[Any], kind: type[Any]) -> bool:
    mlp: Any = next(mlp for mlp in mlps if type(mlp) is kind)
    device = next(mlp.parameters()).device
    x = torch.randn(PROBE_ROWS, mlp.gate_proj.in_features, device=device)
    return torch.allclose(_mlp_forward(mlp, x), mlp(x), rtol=TOLERANCE, atol=TOLERANCE)
