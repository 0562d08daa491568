"""Owns matrix products of 16-bit matrices whose results stay in fp32, and sums of copied rows.

Tensor cores add in fp32 and round at the end. Where the end is a gradient that is kept in fp32, or a logit
whose exponential is taken, the rounding is left out. On a CPU no product of PyTorch does so (torch 2.13).

Shapes: N rows, M inner, K columns.
"""

from __future__ import annotations

import torch


def mm_fp32(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return alpha·a·b (N, K) in fp32, of a (N, M) and b (M, K) in one dtype."""
    return (a.float() @ b.float()).mul_(alpha)


def mm_fp32_shapes(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return an empty result."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def launch_mm_fp32(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """Compute ``mm_fp32`` on CUDA."""
    if a.dtype == torch.float32:
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)
    nothing = a.new_empty((), dtype=torch.float32)
    return torch.addmm(nothing, a, b, torch.float32, beta=0, alpha=alpha)


def addmm_fp32_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a·b to the total (N, K) in fp32, in place, of a (N, M) and b (M, K) in one dtype."""
    total.addmm_(a.float(), b.float())


def addmm_fp32_shapes(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Change nothing."""


def launch_addmm_fp32_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute ``addmm_fp32_`` on CUDA."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, torch.float32, out=total)


def sum_copies(copies: torch.Tensor, starts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return, for each of T rows, the sum of its copies, added in fp32.

    Args:
        copies: (C, F).
        starts: (T + 1,), int32: row n has the copies ``places[starts[n] : starts[n + 1]]``.
        places: (C,), int32: indices of copies.
    """
    num_rows = len(starts) - 1
    numbers = torch.arange(num_rows, device=copies.device)
    owners = numbers.repeat_interleave((starts[1:] - starts[:-1]).long())  # (C,)
    total = copies.new_zeros((num_rows, copies.shape[1]), dtype=torch.float32)
    total.index_add_(0, owners, copies.index_select(0, places).float())
    return total.to(copies.dtype)


def sum_copies_shapes(
    copies: torch.Tensor, starts: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Return an empty result."""
    return copies.new_empty((len(starts) - 1, copies.shape[1]))
