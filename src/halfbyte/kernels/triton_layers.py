"""Owns the kernels in Triton of norms, rotation and gates, each with the function that launches it.

All compute in fp32 and none calls ``tl.dot``: products stay with cuBLAS. So every kernel compiles for compute
capability 7.5 too. The formulas are those of the twins, beside which each is tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GLU_BLOCK = 1024


@triton.jit
def _rms_norm(x, weight, residual, y, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    x32 = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + lane, mask=inside, other=0.0)
    s = 1.0 / tl.sqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    out = x32 * s * w
    if ADDS:
        out += tl.load(residual + start + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + lane, out.to(y.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor:
    """Launch ``norms.rms_norm``."""
    x = x.contiguous()
    other = x if residual is None else residual.contiguous()
    y = torch.empty_like(other)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm[(x.numel() // size,)](
        x, weight, other, y, size, eps, residual is not None, block, num_warps=_warps(block)
    )
    return y


@triton.jit
def _rms_norm_backward(dy, x, weight, dx, size, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    x32 = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
    dyw = tl.load(dy + start + lane, mask=inside, other=0.0).to(tl.float32)
    dyw *= tl.load(weight + lane, mask=inside, other=0.0)
    s = 1.0 / tl.sqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    c = tl.sum(dyw * x32, axis=0) / size * s * s * s
    tl.store(dx + start + lane, (dyw * s - x32 * c).to(dx.dtype.element_ty), mask=inside)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Launch ``norms.rms_norm_backward``."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm_backward[(x.numel() // size,)](
        dy, x, weight, dx, size, eps, block, num_warps=_warps(block)
    )
    return dx


@triton.jit
def _activated(gate, SILU: tl.constexpr):
    """Return act(gate) and its derivative; the tanh of GELU as a sigmoid."""
    if SILU:
        s = tl.sigmoid(gate)
        return gate * s, s * (1.0 + gate * (1.0 - s))
    k = 0.7978845608028654  # √(2/π)
    squared = gate * gate
    t = 2.0 * tl.sigmoid(2.0 * k * gate * (1.0 + 0.044715 * squared)) - 1.0
    slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * k * (1.0 + 0.134145 * squared)
    return 0.5 * gate * (1.0 + t), slope


@triton.jit
def _glu(gate, up, y, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    a, _ = _activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), SILU)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (a * u).to(y.dtype.element_ty), mask=inside)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Launch ``gates.glu``."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    size = gate.numel()
    _glu[(triton.cdiv(size, GLU_BLOCK),)](gate, up, y, size, activation == "silu", GLU_BLOCK)
    return y


@triton.jit
def _glu_backward(dy, gate, up, dgate, dup, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    a, slope = _activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), SILU)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (d * a).to(dup.dtype.element_ty), mask=inside)


def glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``gates.glu_backward``."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    size = gate.numel()
    _glu_backward[(triton.cdiv(size, GLU_BLOCK),)](
        dy, gate, up, dgate, dup, size, activation == "silu", GLU_BLOCK
    )
    return dgate, dup


@triton.jit
def _both_halves(table, at, half, inside):
    """Return both halves of a row, in fp32."""
    first = tl.load(table + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(table + at + half, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm_rope(
    q,
    k,
    cos,
    sin,
    q_weight,
    k_weight,
    q_out,
    k_out,
    dq_in,
    dk_in,
    heads,
    groups,
    half,
    eps,
    NORMS: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = token * heads + head
    x, out, gradient, weight = q, q_out, dq_in, q_weight
    if head >= heads:
        place = token * groups + head - heads
        x, out, gradient, weight = k, k_out, dk_in, k_weight
    lane = tl.arange(0, BLOCK)
    inside = lane < half
    first = place * 2 * half + lane
    table = token * 2 * half + lane
    cos1, cos2 = _both_halves(cos, table, half, inside)
    sin1, sin2 = _both_halves(sin, table, half, inside)
    x1, x2 = _both_halves(x, first, half, inside)
    s = 1.0
    w1 = tl.full((BLOCK,), 1.0, tl.float32)
    w2 = tl.full((BLOCK,), 1.0, tl.float32)
    if NORMS:
        s = 1.0 / tl.sqrt((tl.sum(x1 * x1, axis=0) + tl.sum(x2 * x2, axis=0)) / (2 * half) + eps)
        w1, w2 = _both_halves(weight, lane, half, inside)
    if BACKWARD:
        d1, d2 = _both_halves(gradient, first, half, inside)
        y1 = (d1 * cos1 + d2 * sin2) * w1
        y2 = (d2 * cos2 - d1 * sin1) * w2
        if NORMS:
            c = (tl.sum(y1 * x1, axis=0) + tl.sum(y2 * x2, axis=0)) / (2 * half) * s * s * s
            y1 = y1 * s - x1 * c
            y2 = y2 * s - x2 * c
    else:
        n1 = x1 * s * w1
        n2 = x2 * s * w2
        y1 = n1 * cos1 - n2 * sin1
        y2 = n2 * cos2 + n1 * sin2
    tl.store(out + first, y1.to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + half, y2.to(out.dtype.element_ty), mask=inside)


def norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    gradients: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``rotary.norm_rope``, or with ``gradients`` its backward pass."""
    query, key, cos, sin = query.contiguous(), key.contiguous(), cos.contiguous(), sin.contiguous()
    results = torch.empty_like(query), torch.empty_like(key)
    num_tokens, heads, size = query.shape
    dq, dk = (query, key) if gradients is None else (g.contiguous() for g in gradients)
    block = triton.next_power_of_2(size // 2)
    _norm_rope[(num_tokens, heads + key.shape[1])](
        query,
        key,
        cos,
        sin,
        cos if query_weight is None else query_weight,
        cos if key_weight is None else key_weight,
        *results,
        dq,
        dk,
        heads,
        key.shape[1],
        size // 2,
        eps,
        query_weight is not None,
        gradients is not None,
        block,
        num_warps=1,
    )
    return results


def _warps(block: int) -> int:
    """Return how many groups of 32 threads hold a block."""
    return min(16, max(1, block // 512))
