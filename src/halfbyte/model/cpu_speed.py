"""Owns how a CPU computes: in which dtype, and whether 4-bit weights are unpacked first, by measurement."""

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
from halfbyte.model.quantised import compute_in, plain_weight, unpack_layers

REPEATS = 3
UNPACKED_FRAC = 0.5  # of the free memory, for unpacked weights


@dataclass(frozen=True)
class ComputeMode:
    """A dtype of products, and whether weights stay packed in 4 bits."""

    dtype: torch.dtype
    is_packed: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{NAMES[self.dtype]}, {'packed' if self.is_packed else 'unpacked'}"


@torch.inference_mode()
def time_modes(
    model: Any, modes: list[ComputeMode], num_rows: int
) -> dict[ComputeMode, tuple[float, float]]:
    """Seconds of all linear layers and the head for one row, and for ``num_rows`` in one pass.

    One layer of each shape is timed, the best of three, and counted as often as it is there.
    """
    layers = [m for m in model.modules() if is_packed_layer(m)]
    counted = Counter((m.in_features, m.out_features) for m in layers)
    one_of = {(m.in_features, m.out_features): m for m in layers}
    head = model.get_output_embeddings().weight
    seconds_of = {}
    for mode in modes:
        took = []
        for rows in (1, num_rows):
            seconds = _head_seconds(head, mode, rows)
            for shape, count in counted.items():
                seconds += count * _layer_seconds(one_of[shape], mode, rows)
            took.append(seconds)
        seconds_of[mode] = (took[0], took[1])
    return seconds_of


def modes_that_fit(
    model: Any, dtypes: list[torch.dtype], packings: list[bool], room_bytes: int
) -> tuple[list[ComputeMode], list[ComputeMode]]:
    """Modes for which ``room_bytes`` of memory suffice, and those for which they do not."""
    num_weights = sum(m.in_features * m.out_features for m in model.modules() if is_packed_layer(m))
    usable_bytes = room_bytes * UNPACKED_FRAC
    fits: list[ComputeMode] = []
    too_large: list[ComputeMode] = []
    for dtype, is_packed in itertools.product(dtypes, packings if num_weights else [True]):
        need = 0 if is_packed else num_weights * dtype.itemsize
        (fits if need <= usable_bytes else too_large).append(ComputeMode(dtype, is_packed))
    return fits, too_large


def apply_mode(model: Any, mode: ComputeMode) -> None:
    """Make a model compute in ``mode`` from now on, in place."""
    compute_in(model, mode.dtype)
    if not mode.is_packed:
        unpack_layers(model, mode.dtype)


def is_packed_layer(layer: Any) -> bool:
    """Whether a layer's weight is 4-bit codes."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _layer_seconds(layer: Any, mode: ComputeMode, rows: int) -> float:
    x = torch.randn(1, rows, layer.in_features).to(mode.dtype)
    if not mode.is_packed:
        weight = plain_weight(layer, mode.dtype)
        return _best(lambda: functional.linear(x, weight))
    state = layer.weight.quant_state
    before = layer.compute_dtype, state.dtype
    layer.compute_dtype, state.dtype = mode.dtype, mode.dtype
    try:
        return _best(lambda: layer(x))
    finally:
        layer.compute_dtype, state.dtype = before


def _head_seconds(weight: nn.Parameter, mode: ComputeMode, rows: int) -> float:
    if is_packed_layer(weight) or not weight.is_floating_point():
        return 0.0
    x, matrix = torch.randn(rows, weight.shape[1]).to(mode.dtype), weight.to(mode.dtype)
    return _best(lambda: functional.linear(x, matrix))


def _best(work: Any) -> float:
    work()
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def unpack_for_speed(model: nn.Module) -> None:
    """On a CPU, keep 4-bit weights unpacked where memory has room: the same numbers, made once."""
    states: list[Any] = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    packed = [state for state in states if state is not None]
    device = next(model.parameters()).device
    if device.type != "cpu" or not packed:
        return
    dtype = packed[0].dtype
    if modes_that_fit(model, [dtype], [False], free_bytes(device))[0]:
        unpack_layers(model, dtype)
