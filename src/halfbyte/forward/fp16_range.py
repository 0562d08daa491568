"""Owns fp16 products on devices without bf16: a residual stream in fp32, and the probe of their range.

fp16 ends at 65,504. Gemma-3's residual stream reaches about 3·10⁵, while what enters and leaves its linear
layers is normed and small; other models overflow inside of those layers. So the residual stream is kept in
fp32, and whether the products fit is measured on real rows instead of read off a model's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.data.prefix_tree import Tokens
from halfbyte.forward.packed import pad_right
from halfbyte.forward.probes import eval_mode
from halfbyte.model.load import Loaded
from halfbyte.model.precision import Compute
from halfbyte.model.quantised import compute_in

FP16_MAX = torch.finfo(torch.float16).max
MARGIN = 8  # factor left for rows that the probe has not seen, and for steps to come
PROBE_ROWS = 4


@torch.no_grad()
def largest_product(model: nn.Module, rows: Sequence[Tokens]) -> tuple[float, str]:
    """Return the largest magnitude that enters or leaves a linear layer in fp16, and the layer's name.

    It is infinite or NaN where fp16 overflows. The ``PROBE_ROWS`` longest of the rows are computed.
    """
    longest = sorted(rows, key=lambda row: -len(row[0]))[:PROBE_ROWS]
    device = next(model.parameters()).device
    ids = pad_right(longest, 0, device)["input_ids"]  # (B, T)
    with _largest_magnitudes(model) as magnitudes, torch.autocast(device.type, torch.float16):
        model(input_ids=ids, use_cache=False)
    by_layer = {name: float(magnitude) for name, magnitude in magnitudes.items()}
    # NaN first: it is larger than anything that fits.
    name = max(by_layer, key=lambda name: (by_layer[name] != by_layer[name], by_layer[name]))
    return by_layer[name], name


@contextlib.contextmanager
def _largest_magnitudes(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Keep, for each linear layer by name, the largest magnitude () that it has read or written."""
    magnitudes: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            pair = [tensor.detach().abs().amax().float() for tensor in (inputs[0], output)]
            magnitudes[name] = torch.stack([magnitudes.get(name, pair[0]), *pair]).amax()

        return hook

    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_hook(hook_of(name)) for name, module in linear.items()]
    try:
        yield magnitudes
    finally:
        for hook in hooks:
            hook.remove()


def settle_half(loaded: Loaded, model: nn.Module, rows: Sequence[Tokens]) -> str:
    """Switch to fp32 products where fp16 would overflow, in place.

    Args:
        loaded: a quantised base that computes in fp16; its ``compute`` is replaced.
        model: the base with its adapter.
        rows: training rows.

    Returns:
        the measurement and what follows from it.
    """
    with eval_mode(model):
        magnitude, name = largest_product(model, rows)
    short = name.removeprefix("base_model.model.")
    measured = (
        f"the largest number at a linear layer is {magnitude:.3g}, at {short}; fp16 ends at"
        f" {FP16_MAX:.0f}"
    )
    dtype, reason = torch.float16, f"{measured}; the residual stream is fp32"
    if not magnitude <= FP16_MAX / MARGIN:  # NaN too
        dtype, reason = torch.float32, f"{measured}, which leaves no room"
        compute_in(loaded.model, dtype)
    loaded.compute = Compute(loaded.compute.device, dtype, reason)
    return reason
