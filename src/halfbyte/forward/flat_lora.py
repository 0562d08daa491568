"""Owns the adapter in one block of memory: all of its 16-bit copies are made in two launches a pass.

Each matrix A and B stays PEFT's parameter, as a part of one fp32 tensor: optimizer, checkpoints and files see
what they saw before.

Shapes: P weights of the adapter, the first P_A of them in matrices A; r, R, in and out as in ``fused_lora``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn


class Group(Protocol):
    """Layers whose matrices A are read together; see ``fused_lora.LayerGroup``."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A (r, in) and B (out, r) of each layer."""
        ...

    @property
    def ranks(self) -> list[int]:
        """The rank of each layer."""
        ...

    @property
    def scale(self) -> float:
        """The factor s of all layers."""
        ...


class FlatLora:
    """The matrices of groups of layers, side by side, and their 16-bit copies.

    Args:
        groups: on one device, in fp32.
        dtype: of the copies.

    Attributes:
        values: (P,), in fp32.
        copies: (P,), in ``dtype``.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype) -> None:
        self.groups = list(groups)
        self.lora_a = [a for group in self.groups for a in group.parameters[::2]]
        self.lora_b = [b for group in self.groups for b in group.parameters[1::2]]
        self.num_a = sum(a.numel() for a in self.lora_a)
        self._scales: float | torch.Tensor = 1.0  # or (P_A,)
        self._lay_side_by_side()
        self._make_copies(dtype)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All A and then all B, in the order in which they lie side by side."""
        return [*self.lora_a, *self.lora_b]

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Copy the adapter's current values to ``dtype``, for the pass that begins and its backward pass."""
        if not self._is_side_by_side():
            self._lay_side_by_side()
        if self.copies.dtype != dtype:
            self._make_copies(dtype)
        a, b = self.values[: self.num_a], self.values[self.num_a :]
        torch.mul(a, self._scales, out=self.copies[: self.num_a])
        self.copies[self.num_a :].copy_(b)
        self._version = self._current_version()

    def copies_of(
        self, group: Group, dtype: torch.dtype
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Return sA (R, in) and each B (out, r) of a group; None if there is no copy of current values."""
        if self.copies.dtype != dtype or self._version != self._current_version():
            return None
        return self._views.get(id(group))

    def _current_version(self) -> int:
        # An optimizer's step or a loaded checkpoint changes all parameters in place.
        return self.lora_b[-1]._version

    def _is_side_by_side(self) -> bool:
        # An attribute of torch's storages without a public name, as ``plan.live`` uses it: it also tells fake
        # tensors apart, which have no address.
        storage, offset = self.values.untyped_storage()._cdata, 0
        for parameter in self.parameters:
            here = parameter.untyped_storage()._cdata, parameter.storage_offset()
            if here != (storage, offset):
                return False
            offset += parameter.numel()
        return True

    @torch.no_grad()
    def _lay_side_by_side(self) -> None:
        """Make each parameter a part of one tensor, with its values."""
        parameters = self.parameters
        self.values = torch.cat([parameter.detach().flatten() for parameter in parameters])
        parts = torch.split(self.values, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
        scales = {group.scale for group in self.groups}
        if len(scales) == 1:
            self._scales = scales.pop()
            return
        self._scales = torch.cat(
            [a.new_full((a.numel(),), g.scale) for g in self.groups for a in g.parameters[::2]]
        )

    def _make_copies(self, dtype: torch.dtype) -> None:
        self.copies = torch.empty_like(self.values, dtype=dtype)
        self._views = self._views_of_copies()
        self._version = -1

    def _views_of_copies(self) -> dict[int, tuple[torch.Tensor, list[torch.Tensor]]]:
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = list(torch.split(self.copies, sizes))
        start, num_matrices = 0, len(self.lora_a)
        views = {}
        position = 0
        for group in self.groups:
            number, inputs = len(group.ranks), group.parameters[0].shape[1]
            rows = sum(group.ranks)
            together = self.copies[position : position + rows * inputs].view(rows, inputs)
            shapes = [b.shape for b in group.parameters[1::2]]
            flat = parts[num_matrices + start : num_matrices + start + number]
            views[id(group)] = (
                together,
                [part.view(shape) for part, shape in zip(flat, shapes, strict=True)],
            )
            start, position = start + number, position + rows * inputs
        return views
