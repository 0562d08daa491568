"""Owns the unpacking of 4-bit weights with double quantisation in one launch (QLoRA, arXiv 2305.14314 §3).

Weight n is table[code n]·m with the maximum m of its block; with double quantisation block k has
m = table₂[code₂ k]·m₂ + offset with the maximum m₂ of the block of blocks.
"""

from __future__ import annotations

import torch

NESTED_BLOCK = 256  # block maxima that share one maximum in turn


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
    """Return the weights (out, in) that 4-bit codes stand for.

    Args:
        codes: two weights a byte, the first in the upper half.
        maxima: of each block, in fp32, or its code with double quantisation.
        table: values (16,) of the codes, in fp32.
        nested_table: values (256,) of the codes of maxima; None without double quantisation.
        nested_maxima: of each 256 blocks, in fp32.
        offset: (), added to every maximum.
        block: weights that share a maximum.
        shape: of the weights.
        dtype: of the weights.
    """
    num_weights = shape[0] * shape[1]
    pairs = codes.flatten().int()
    weights = table[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()][:num_weights]
    if nested_table is not None and nested_maxima is not None and offset is not None:
        large = nested_maxima.repeat_interleave(NESTED_BLOCK)[: len(maxima)]
        maxima = nested_table[maxima.int()] * large + offset
    scales = maxima.repeat_interleave(block)[:num_weights]
    return (weights * scales).to(dtype).view(shape)
