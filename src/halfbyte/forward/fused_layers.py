"""Owns norms and gated MLPs that keep less for the backward pass and make fewer passes over memory.

Shapes: … any leading dimensions, E hidden size, F size of the MLP, P rows of a probe.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.config.schema import Speed
from halfbyte.forward.fused_lora import apply_recipe, fuse_lora

PROBE_ROWS = 4
TOLERANCE = 1e-5
# Classes of transformers 5.23 and torch 2.13, by name: transformers has no attribute that says which
# function an activation is. Can go when it has one. A class that is missing here keeps its own MLP.
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
EPS_ATTRIBUTES = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class RMSNorm:
    """The root-mean-square norm (arXiv 1910.07467 §4) as a recipe, computed in fp32.

    y = x·s·w with s = (mean(x²) + eps)^(-1/2), and dx = s·(dy·w - x·s²·mean(dy·w·x)).

    Attributes:
        weight: w (E,), in fp32 and frozen.
        eps: keeps rows of zeros finite.
    """

    weight: torch.Tensor
    eps: float

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the norm (…, E) of x, in the dtype of x."""
        (x,) = inputs
        x32 = x.float()  # (…, E)
        y: torch.Tensor = (x32 * self._scale(x32)).mul_(self.weight).to(x.dtype)
        return y

    def backward(self, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradient (…, E) of x."""
        (x,) = inputs
        x32 = x.float()  # (…, E)
        s = self._scale(x32)  # (…, 1)
        dyw = dy.float() * self.weight  # (…, E)
        c = torch.linalg.vecdot(dyw, x32)[..., None]  # (…, 1)
        c.mul_(s).mul_(s).mul_(s).div_(-x.shape[-1])  # -s³·mean(dy·w·x)
        return (dyw.mul_(s).addcmul_(x32, c).to(x.dtype),)

    def _scale(self, x32: torch.Tensor) -> torch.Tensor:
        """Return s (…, 1); mean(x²) is |x|² / E."""
        norm: torch.Tensor = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # (…, 1)
        return norm.square_().div_(x32.shape[-1]).add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class GLU:
    """The gated linear unit act(gate)·up (arXiv 2002.05202 §2) as a recipe.

    d(up) = dy·act(gate), and d(gate) = dy·up·act'(gate).

    Attributes:
        activation: ``silu`` or ``gelu_tanh``.
    """

    activation: str

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the product (…, F)."""
        gate, up = inputs
        return self._activate(gate).mul_(up)

    def backward(self, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients (…, F) of gate and up; the activation is computed again."""
        gate, up = inputs
        dup = self._activate(gate).mul_(dy)
        dact = dy * up
        # Private operators, tried with torch 2.13: each computes dact·act'(gate) in one pass over memory,
        # where public functions take several. Can go when torch has a public function for it.
        if self.activation == "silu":
            dgate = torch.ops.aten.silu_backward(dact, gate)
        else:
            dgate = torch.ops.aten.gelu_backward(dact, gate, approximate="tanh")
        return dgate, dup

    def _activate(self, gate: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return nn.functional.silu(gate)
        return nn.functional.gelu(gate, approximate="tanh")


def fuse(model: nn.Module, speed: Speed, *, probe: bool = True) -> None:
    """Replace the layers of PEFT and transformers by the fused ones that ``speed`` allows, in place."""
    if speed.fused_lora:
        fuse_lora(model)
    if speed.fused_layers:
        fuse_layers(model, probe=probe)


def fuse_layers(model: nn.Module, *, probe: bool = True) -> tuple[int, int]:
    """Replace a model's norms and gated MLPs by ``RMSNorm`` and ``GLU``, in place.

    Args:
        model: its norms and MLPs are recognised by their class names and attributes.
        probe: replace a class of modules only if the results are the same; a model without data has none to
            compare.

    Returns:
        how many norms and MLPs were replaced.
    """
    norms: list[Any] = [
        m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _eps(m)
    ]
    mlps: dict[Any, GLU] = {m: glu for m in model.modules() if (glu := _glu_of(m))}
    offsets = {
        kind: _weight_offset(norms, kind) if probe else 0.0 for kind in set(map(type, norms))
    }
    num_norms = 0
    for norm in norms:
        offset = offsets[type(norm)]
        if offset is not None and not norm.weight.requires_grad:
            norm.forward = functools.partial(apply_recipe, _rms_norm_of(norm, offset))
            num_norms += 1
    is_same = {kind: not probe or _is_gated(mlps, kind) for kind in set(map(type, mlps))}
    for mlp, glu in mlps.items():
        if is_same[type(mlp)]:
            mlp.forward = functools.partial(_mlp_forward, mlp, glu)
    return num_norms, sum(is_same[type(mlp)] for mlp in mlps)


def _eps(module: Any) -> float | None:
    """Return the epsilon of a norm, or None if the module has no weight vector or no epsilon."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    return next(
        (float(getattr(module, name)) for name in EPS_ATTRIBUTES if hasattr(module, name)), None
    )


def _rms_norm_of(module: Any, offset: float) -> RMSNorm:
    """Return the recipe of a norm that adds ``offset`` to its weight."""
    weight = module.weight.detach().float()  # (E,)
    return RMSNorm(weight + offset if offset else weight, _eps(module) or 0.0)


@torch.no_grad()
def _weight_offset(norms: list[Any], kind: type[Any]) -> float | None:
    """Return what norms of a class add to their weight: 0, 1 (Gemma), or None for any other norm."""
    norm: Any = next(norm for norm in norms if type(norm) is kind)
    x = torch.randn(PROBE_ROWS, norm.weight.shape[0], device=norm.weight.device)  # (P, E)
    expected = norm(x)  # (P, E)
    for offset in (0.0, 1.0):
        y = _rms_norm_of(norm, offset).forward(x)  # (P, E)
        if torch.allclose(y, expected.float(), rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _glu_of(module: Any) -> GLU | None:
    """Return the recipe of a gated MLP, or None if the module is none or its activation is not known."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    activation = ACTIVATIONS.get(type(module.act_fn).__name__)
    return GLU(activation) if activation else None


def _mlp_forward(mlp: Any, glu: GLU, x: torch.Tensor) -> torch.Tensor:
    """Compute a gated MLP: (…, E) through (…, F) to (…, E)."""
    y: torch.Tensor = mlp.down_proj(apply_recipe(glu, mlp.gate_proj(x), mlp.up_proj(x)))
    return y


@torch.no_grad()
def _is_gated(mlps: dict[Any, GLU], kind: type[Any]) -> bool:
    """Whether MLPs of a class compute what ``_mlp_forward`` computes."""
    mlp, glu = next((mlp, glu) for mlp, glu in mlps.items() if type(mlp) is kind)
    device = next(mlp.parameters()).device
    x = torch.randn(PROBE_ROWS, mlp.gate_proj.in_features, device=device)  # (P, E)
    return torch.allclose(_mlp_forward(mlp, glu, x), mlp(x), rtol=TOLERANCE, atol=TOLERANCE)
