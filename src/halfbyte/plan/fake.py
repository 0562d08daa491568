"""Owns what lets a real model run without data: fake tensors for meta ones, attention that needs no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfbyte.forward.prefix_attention import Part, PrefixTree, attend
from halfbyte.model.quantised import replace_tensors

ATTENTION = "halfbyte_plan"
MATH_ATTENTION = "halfbyte_plan_math"


def materialise(model: nn.Module) -> list[torch.Tensor]:
    """Give a meta model fake tensors in place; returns them."""
    made: dict[int, Any] = {}
    kept: list[torch.Tensor] = []

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        kept.append(found)
        return found

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                twin: Any = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                twin.__dict__.update(parameter.__dict__)
                made[id(parameter)] = (twin, parameter)
            module._parameters[name] = made[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        replace_tensors(module, fake)
    return kept


def register_attention() -> None:
    """Teach transformers two attentions for plans: SDPA as it is, and SDPA without fused kernels.

    Both leave the mask out where SDPA would; asked of fake tensors, transformers would build one.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    def plain(*args: Any, **options: Any) -> Any:
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
        return one.expand(batch_size, -1, -1, -1)  # rows share it, as transformers' own

    for name, function in ((ATTENTION, attend), (MATH_ATTENTION, plain)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


class FewParts(PrefixTree):
    """A tree whose parts stand for all: what a part takes goes with it, so that the largest counts."""

    def parts(self, window: int | None) -> tuple[list[Part], list[Part]]:
        """The two largest of each kind."""
        own, above = super().parts(window)
        return _largest(own), _largest(above)


def _largest(parts: list[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.queries.start - part.queries.stop)[:2]
