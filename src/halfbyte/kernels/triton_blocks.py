"""Owns the kernels in Triton of unpacking, softmax and sums of copies, each with the function that launches it.

As in ``triton_layers``: in fp32, and without ``tl.dot``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.kernels.unpack import NESTED_BLOCK

UNPACK_BLOCKS = 16  # blocks of 64 weights for a program
SOFTMAX_BLOCK = 4096
COPIES_BLOCK = 512


@triton.jit
def _unpack_4bit(
    codes,
    maxima,
    table,
    nested_table,
    nested_maxima,
    offset,
    weights,
    num_blocks,
    num_weights,
    NESTED: tl.constexpr,
    HALF: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_blocks
    if NESTED:
        code = tl.load(maxima + row, mask=inside, other=0).to(tl.int32)
        large = tl.load(nested_maxima + row // NESTED_BLOCK, mask=inside, other=0.0)
        scale = tl.load(nested_table + code) * large + tl.load(offset)
    else:
        scale = tl.load(maxima + row, mask=inside, other=0.0)
    pair = row[:, None].to(tl.int64) * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(codes + pair, mask=pair * 2 < num_weights, other=0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale[:, None]
    low = tl.load(table + (byte & 15)) * scale[:, None]
    both = tl.interleave(high, low).to(weights.dtype.element_ty)
    at = row[:, None].to(tl.int64) * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(weights + at, both, mask=at < num_weights)


def unpack_4bit(
    codes: torch.Tensor,
    maxima: torch.Tensor,
    table: torch.Tensor,
    nested_table: torch.Tensor | None,
    nested_maxima: torch.Tensor | None,
    offset: torch.Tensor | None,
    block: int,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch ``unpack.unpack_4bit``."""
    weights = codes.new_empty(shape, dtype=dtype)
    num_blocks = maxima.numel()
    rows = max(1, UNPACK_BLOCKS * 64 // block)
    _unpack_4bit[(triton.cdiv(num_blocks, rows),)](
        codes,
        maxima,
        table,
        table if nested_table is None else nested_table,
        table if nested_maxima is None else nested_maxima,
        table if offset is None else offset,
        weights,
        num_blocks,
        weights.numel(),
        nested_table is not None,
        block // 2,
        NESTED_BLOCK,
        rows,
    )
    return weights


@triton.jit
def _softmax_block(
    logits,
    labels,
    first,
    running,
    p,
    num_predictions,
    size,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * size
    old = tl.load(running + row)
    new = old
    for n in range(NUM_BLOCKS):
        lane = n * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + start + lane, mask=lane < size, other=float("-inf"))
        if CAPPED:
            z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
        new = tl.maximum(new, tl.max(tl.where(lane < size, z, float("-inf")), axis=0))
    total = 0.0
    for n in range(NUM_BLOCKS):
        lane = n * BLOCK + tl.arange(0, BLOCK)
        inside = lane < size
        z = tl.load(logits + start + lane, mask=inside, other=float("-inf"))
        slope = tl.full((BLOCK,), 1.0, tl.float32)
        if CAPPED:
            t = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
            z = softcap * t
            slope = 1.0 - t * t
        e = tl.where(inside, tl.exp(z - new), 0.0)
        total += tl.sum(e, axis=0)
        tl.store(p + start + lane, (e * slope).to(p.dtype.element_ty), mask=inside)
    column = tl.load(labels + row).to(tl.int64) - first
    if (column >= 0) & (column < size):
        z_label = tl.load(logits + start + column)
        if CAPPED:
            z_label = softcap * (2.0 * tl.sigmoid(2.0 * z_label / softcap) - 1.0)
        tl.store(running + 2 * num_predictions + row, z_label)
    decay = tl.exp(old - new)
    before = tl.load(running + num_predictions + row)
    tl.store(running + row, new)
    tl.store(running + num_predictions + row, before * decay + total)
    tl.store(running + 3 * num_predictions + row, decay)


def softmax_block(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    running: torch.Tensor,
    softcap: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch ``softmax.softmax_block``."""
    p = torch.empty_like(logits, dtype=dtype)
    num_predictions, size = logits.shape
    block = min(SOFTMAX_BLOCK, triton.next_power_of_2(size))
    _softmax_block[(num_predictions,)](
        logits,
        labels,
        first,
        running,
        p,
        num_predictions,
        size,
        softcap or 1.0,
        softcap > 0,
        block,
        triton.cdiv(size, block),
        num_warps=8,
    )
    return p


@triton.jit
def _sum_copies(copies, starts, places, total, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < size
    value = tl.zeros((BLOCK,), tl.float32)
    n = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    while n < end:
        place = tl.load(places + n).to(tl.int64)
        value += tl.load(copies + place * size + lane, mask=inside, other=0.0).to(tl.float32)
        n += 1
    tl.store(total + row.to(tl.int64) * size + lane, value.to(total.dtype.element_ty), mask=inside)


def sum_copies(copies: torch.Tensor, starts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Launch ``products.sum_copies``."""
    copies = copies.contiguous()
    num_rows, size = len(starts) - 1, copies.shape[1]
    total = copies.new_empty((num_rows, size))
    grid = (num_rows, triton.cdiv(size, COPIES_BLOCK))
    _sum_copies[grid](copies, starts, places, total, size, COPIES_BLOCK)
    return total
