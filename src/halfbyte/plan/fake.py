"""Owns running a real model without data: fake tensors instead of meta ones, attention without a mask."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfbyte.data.prefix_tree import Node
from halfbyte.forward.packed_layout import longest_of
from halfbyte.forward.prefix_attention import attend
from halfbyte.forward.tree_parts import Part, PrefixTree
from halfbyte.forward.varlen_attention import VarlenTree
from halfbyte.kernels.capability import capability_of
from halfbyte.kernels.operators import uses_operators
from halfbyte.model.quantised import replace_tensors

ATTENTION = "halfbyte_plan"
MATH_ATTENTION = "halfbyte_plan_math"


def materialise(model: nn.Module) -> list[torch.Tensor]:
    """Replace a meta model's tensors by fake ones in place, and return those."""
    twins: dict[int, Any] = {}
    fakes: list[torch.Tensor] = []

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        fakes.append(twin)
        return twin

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in twins:
                twin: Any = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                twin.__dict__.update(parameter.__dict__)
                twins[id(parameter)] = (twin, parameter)
            module._parameters[name] = twins[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        replace_tensors(module, fake)
    return fakes


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return what makes products compute in a dtype, as in training."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype)


def register_attention() -> None:
    """Register two attentions for plans with transformers: SDPA, and SDPA without fused kernels.

    Both omit the mask where SDPA would; on fake tensors transformers itself would build one.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    def unfused(*args: Any, **options: Any) -> Any:
        mask = args[4] if len(args) > 4 else options.get("attention_mask")
        if mask is not None:
            return attend(*args, **options)
        with sdpa_kernel(SDPBackend.MATH):
            return attend(*args, **options)

    def mask(
        batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **_: Any
    ) -> torch.Tensor | None:
        if local_size is None or kv_length < local_size:
            return None
        one = torch.empty((1, 1, q_length, kv_length), dtype=torch.bool)
        return one.expand(batch_size, -1, -1, -1)  # shared by all rows, as in transformers

    for name, function in ((ATTENTION, attend), (MATH_ATTENTION, unfused)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


def planned_tree(nodes: tuple[Node, ...], *, varlen: bool) -> PrefixTree | VarlenTree:
    """Return a tree of these nodes without data; ``varlen``: for one attention call, where cards have it."""
    device = torch.device("cpu")
    if not varlen or not uses_operators(device):
        return LargestParts(nodes, device, gathered=capability_of(device) is not None)
    starts = torch.empty(len(nodes) + 1, dtype=torch.int32)
    copies = None
    if any(node.parent >= 0 for node in nodes):
        num_keys = sum(node.position + node.length for node in nodes)
        num_tokens = max(node.end for node in nodes)
        sizes = (num_keys, num_tokens + 1, num_keys)
        rows, places, order = (torch.empty(size, dtype=torch.int32) for size in sizes)
        copies = rows, places, order
    return VarlenTree(starts, torch.empty_like(starts), longest_of(nodes), copies)


class LargestParts(PrefixTree):
    """A prefix tree that computes only its largest parts.

    The memory of each part is freed before the next one, so that the largest decides the peak.
    """

    def parts(self, window: int | None) -> tuple[list[Part], list[Part]]:
        """Return the two largest parts of each kind."""
        within, above = super().parts(window)
        return _largest(within), _largest(above)


def _largest(parts: list[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.queries.start - part.queries.stop)[:2]
