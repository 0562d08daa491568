"""Owns norms and gated MLPs that keep less for the backward pass and make fewer passes over memory.

Shapes: … any leading dimensions, E hidden size, F size of the MLP, P rows of a probe.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.forward.fused_lora import apply_recipe, bound_group
from halfbyte.kernels.operators import operator

PROBE_ROWS = 4
TOLERANCE = 1e-5
ROUNDINGS = 8  # in 16 bits, by which two orders of the same sums may differ
# Classes of transformers 5.23 and torch 2.13, by name: transformers has no attribute that says which
# function an activation is. Can go when it has one. A class that is missing here keeps its own MLP.
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
EPS_ATTRIBUTES = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class RMSNorm:
    """The root-mean-square norm as a recipe; see ``kernels.norms``.

    Attributes:
        weight: w (E,), in fp32 and frozen.
        eps: keeps rows of zeros finite.
    """

    weight: torch.Tensor
    eps: float

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the norm (…, E) of x, in the dtype of x."""
        (x,) = inputs
        call = operator("rms_norm", x.device)
        y: torch.Tensor = call(x, self.weight, self.eps, None)
        return y

    def backward(self, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradient (…, E) of x."""
        (x,) = inputs
        return (operator("rms_norm_backward", x.device)(dy, x, self.weight, self.eps),)


@dataclass(frozen=True)
class GLU:
    """The gated linear unit act(gate)·up as a recipe; see ``kernels.gates``.

    Attributes:
        activation: ``silu`` or ``gelu_tanh``.
    """

    activation: str

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the product (…, F)."""
        gate, up = inputs
        y: torch.Tensor = operator("glu", gate.device)(gate, up, self.activation)
        return y

    def backward(self, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients (…, F) of gate and up; the activation is computed again."""
        gate, up = inputs
        gradients: tuple[torch.Tensor, ...] = operator("glu_backward", gate.device)(
            dy, gate, up, self.activation
        )
        return gradients


def fuse_layers(model: nn.Module, *, probe: bool = True) -> tuple[int, int]:
    """Replace a model's norms and gated MLPs by ``RMSNorm`` and ``GLU``, in place.

    Args:
        model: its norms and MLPs are recognised by their class names and attributes.
        probe: replace a class of modules only if the results are the same; a model without data has none to
            compare.

    Returns:
        how many norms and MLPs were replaced.
    """
    norms: list[Any] = [m for m in model.modules() if is_norm(m) and _eps(m)]
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


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a root-mean-square norm, by its class name."""
    return type(module).__name__.endswith("RMSNorm")


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module is a gated MLP of linear layers, by its parts."""
    parts = [getattr(module, name, None) for name in MLP_PARTS]
    return None not in parts and all(hasattr(layer, "in_features") for layer in parts[:3])


def recipe_of(norm: Any) -> RMSNorm | None:
    """Return the recipe that a norm was replaced by, or None if it was not."""
    function = getattr(norm, "forward", None)
    recipe = function.args[0] if isinstance(function, functools.partial) else None
    return recipe if isinstance(recipe, RMSNorm) else None


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
    if not is_gated_mlp(module):
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
    projections = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    device, size = next(mlp.parameters()).device, projections[0].in_features
    narrow = next((dtype for p in projections if (dtype := _narrow_dtype(p))), None)
    x = torch.randn(PROBE_ROWS, size, device=device)  # (P, E)
    with torch.autocast(device.type, narrow, enabled=narrow is not None):
        y, expected = _mlp_forward(mlp, glu, x), mlp(x)  # (P, E)
    tolerance = ROUNDINGS * torch.finfo(narrow).eps if narrow else TOLERANCE
    return torch.allclose(y, expected, rtol=tolerance, atol=tolerance)


def _narrow_dtype(layer: Any) -> torch.dtype | None:
    """Return the 16-bit dtype that a layer's inputs must have, or None if they may be in fp32, which rounds less.

    Packed layers and those of a ``LayerGroup`` convert what they get or their weight; others multiply as they are.
    """
    dtype = next(layer.parameters()).dtype  # of the frozen weight
    converts = not dtype.is_floating_point or bound_group(layer) is not None
    return None if converts or dtype == torch.float32 else dtype
