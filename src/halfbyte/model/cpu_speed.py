"""Owns how a CPU computes, by measurement: in which dtype, and whether packed weights are unpacked first."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from halfbyte.host import free_bytes
from halfbyte.model.precision import NAMES
from halfbyte.model.quantised import (
    compute_in,
    is_packed_layer,
    multiply_in,
    plain_weight,
    unpack_layers,
)

REPEATS = 3
UNPACKED_FRAC = 0.5  # share of the free memory that unpacked weights may take


@dataclass(frozen=True)
class ComputeMode:
    """Combines the dtype of matrix products with whether weights stay packed in 4 or 8 bits."""

    dtype: torch.dtype
    is_packed: bool

    @property
    def name(self) -> str:
        """Return a readable name, such as ``bf16, packed``."""
        return f"{NAMES[self.dtype]}, {'packed' if self.is_packed else 'unpacked'}"


@torch.inference_mode()
def time_modes(
    model: Any, modes: list[ComputeMode], num_rows: int
) -> dict[ComputeMode, tuple[float, float]]:
    """Measure all linear layers and the head in seconds, for one row and for ``num_rows`` in one pass.

    One layer of each shape is timed, the best of three runs, and counted once for each layer of that
    shape.
    """
    layers = [m for m in model.modules() if is_packed_layer(m)]
    layer_counts = Counter((m.in_features, m.out_features) for m in layers)
    sample_layers = {(m.in_features, m.out_features): m for m in layers}
    head = model.get_output_embeddings().weight
    seconds_of = {}
    for mode in modes:
        pass_seconds = []
        for rows in (1, num_rows):
            seconds = _head_seconds(head, mode, rows)
            for shape, count in layer_counts.items():
                seconds += count * _layer_seconds(sample_layers[shape], mode, rows)
            pass_seconds.append(seconds)
        seconds_of[mode] = (pass_seconds[0], pass_seconds[1])
    return seconds_of


def modes_that_fit(
    model: Any, dtypes: list[torch.dtype], packings: list[bool], available_bytes: int
) -> tuple[list[ComputeMode], list[ComputeMode]]:
    """Split the modes into those that fit in ``available_bytes`` of memory and those that do not."""
    num_weights = sum(m.in_features * m.out_features for m in model.modules() if is_packed_layer(m))
    usable_bytes = available_bytes * UNPACKED_FRAC
    fits: list[ComputeMode] = []
    too_large: list[ComputeMode] = []
    for dtype, is_packed in itertools.product(dtypes, packings if num_weights else [True]):
        needed_bytes = 0 if is_packed else num_weights * dtype.itemsize
        (fits if needed_bytes <= usable_bytes else too_large).append(ComputeMode(dtype, is_packed))
    return fits, too_large


def apply_mode(model: Any, mode: ComputeMode) -> None:
    """Make a model compute in ``mode`` from now on, in place."""
    compute_in(model, mode.dtype)
    if not mode.is_packed:
        unpack_layers(model, mode.dtype)


def _layer_seconds(layer: Any, mode: ComputeMode, rows: int) -> float:
    x = torch.randn(1, rows, layer.in_features).to(mode.dtype)
    if not mode.is_packed:
        weight = plain_weight(layer, mode.dtype)
        return _best_seconds(lambda: functional.linear(x, weight))
    before = layer.compute_dtype
    multiply_in(layer, mode.dtype)
    try:
        return _best_seconds(lambda: layer(x))
    finally:
        multiply_in(layer, before)


def _head_seconds(weight: nn.Parameter, mode: ComputeMode, rows: int) -> float:
    if not weight.is_floating_point():
        return 0.0
    x, matrix = torch.randn(rows, weight.shape[1]).to(mode.dtype), weight.to(mode.dtype)
    return _best_seconds(lambda: functional.linear(x, matrix))


def _best_seconds(work: Any) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def unpack_for_speed(model: nn.Module) -> None:
    """Unpack packed weights to the same numbers once, on a CPU with enough free memory."""
    packed: Any = next((layer for layer in model.modules() if is_packed_layer(layer)), None)
    device = next(model.parameters()).device
    if device.type != "cpu" or packed is None:
        return
    if modes_that_fit(model, [packed.compute_dtype], [False], free_bytes(device))[0]:
        unpack_layers(model, packed.compute_dtype)
