"""Owns the way to compute on a CPU: the dtype, and whether 4-bit weights are unpacked first, by measurement."""

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

UNPACKED_FRAC = 0.25  # of the free memory

REPEATS = 3
USABLE_FRAC = 0.5  # of the available memory, for unpacked weights


@dataclass(frozen=True)
class Way:
    """A dtype of products, and whether weights stay packed in 4 bits."""

    dtype: torch.dtype
    is_packed: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{NAMES[self.dtype]}, {'packed' if self.is_packed else 'unpacked'}"


@torch.inference_mode()
def measure_ways(model: Any, ways: list[Way], num_rows: int) -> dict[Way, tuple[float, float]]:
    """Seconds of all linear layers and the head for one row, and for ``num_rows`` in one pass.

    One layer of each shape is timed, the best of three, and counted as often as it is there.
    """
    layers = [m for m in model.modules() if is_packed_layer(m)]
    counted = Counter((m.in_features, m.out_features) for m in layers)
    one_of = {(m.in_features, m.out_features): m for m in layers}
    head = model.get_output_embeddings().weight
    found = {}
    for way in ways:
        took = []
        for rows in (1, num_rows):
            seconds = _head_seconds(head, way, rows)
            for shape, count in counted.items():
                seconds += count * _layer_seconds(one_of[shape], way, rows)
            took.append(seconds)
        found[way] = (took[0], took[1])
    return found


def possible_ways(
    model: Any, dtypes: list[torch.dtype], packings: list[bool], free_bytes: int
) -> tuple[list[Way], list[Way]]:
    """Ways for which ``free_bytes`` have room, and those for which they do not."""
    num_weights = sum(m.in_features * m.out_features for m in model.modules() if is_packed_layer(m))
    available = free_bytes * USABLE_FRAC
    fits: list[Way] = []
    too_large: list[Way] = []
    for dtype, is_packed in itertools.product(dtypes, packings if num_weights else [True]):
        need = 0 if is_packed else num_weights * dtype.itemsize
        (fits if need <= available else too_large).append(Way(dtype, is_packed))
    return fits, too_large


def take_way(model: Any, way: Way) -> None:
    """Let a model compute so from now on."""
    compute_in(model, way.dtype)
    if not way.is_packed:
        unpack_layers(model, way.dtype)


def is_packed_layer(layer: Any) -> bool:
    """Whether a layer's weight is 4-bit codes."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _layer_seconds(layer: Any, way: Way, rows: int) -> float:
    x = torch.randn(1, rows, layer.in_features).to(way.dtype)
    if not way.is_packed:
        weight = plain_weight(layer, way.dtype)
        return _best(lambda: functional.linear(x, weight))
    state = layer.weight.quant_state
    before = layer.compute_dtype, state.dtype
    layer.compute_dtype, state.dtype = way.dtype, way.dtype
    try:
        return _best(lambda: layer(x))
    finally:
        layer.compute_dtype, state.dtype = before


def _head_seconds(weight: nn.Parameter, way: Way, rows: int) -> float:
    if is_packed_layer(weight) or not weight.is_floating_point():
        return 0.0
    x, matrix = torch.randn(rows, weight.shape[1]).to(way.dtype), weight.to(way.dtype)
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
    """On a CPU, keep 4-bit weights unpacked if they take little of the memory: the same numbers, made once."""
    states: list[Any] = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    packed = [state for state in states if state is not None]
    device = next(model.parameters()).device
    if device.type != "cpu" or not packed:
        return
    dtype = packed[0].dtype
    if sum(state.shape.numel() for state in packed) * dtype.itemsize <= UNPACKED_FRAC * free_bytes(
        device
    ):
        unpack_layers(model, dtype)
