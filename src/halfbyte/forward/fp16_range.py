"""Owns fp16 products on devices without bf16: a residual stream in fp32, and the probe of their range.

fp16 ends at 65,504. Gemma-3's residual stream goes to about 3·10⁵, while what enters and leaves its linear
layers is normed and small; other models overflow inside of them. So the sum over layers is kept in
fp32, and whether the products fit is measured on real rows, not read off a model's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.data.prefix_tree import Tokens
from halfbyte.forward.packed import pad_right
from halfbyte.model.load import Loaded
from halfbyte.model.precision import Compute
from halfbyte.model.quantised import compute_in

LARGEST = torch.finfo(torch.float16).max
MARGIN = 8  # for rows that the probe has not seen, and for steps to come
PROBE_ROWS = 4


@torch.no_grad()
def largest_product(model: nn.Module, rows: Sequence[Tokens]) -> tuple[float, str]:
    """The largest number that enters or leaves a linear layer in fp16, and the layer's name.

    Infinite or NaN where fp16 overflows.
    """
    longest = sorted(rows, key=lambda row: -len(row[0]))[:PROBE_ROWS]
    device = next(model.parameters()).device
    ids = pad_right(longest, 0, device)["input_ids"]
    with _watched(model) as seen, torch.autocast(device.type, torch.float16):
        model(input_ids=ids, use_cache=False)
    found = {name: float(size) for name, size in seen.items()}
    # NaN first: it is larger than anything that fits.
    name = max(found, key=lambda name: (found[name] != found[name], found[name]))
    return found[name], name


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The largest number so far at each linear layer."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            sizes = [tensor.detach().abs().amax().float() for tensor in (inputs[0], output)]
            seen[name] = torch.stack([seen.get(name, sizes[0]), *sizes]).amax()

        return hook

    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in linear.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def settle_half(loaded: Loaded, model: nn.Module, rows: Sequence[Tokens]) -> str:
    """Go over to fp32 products where fp16 would not hold them, in place; returns what was found.

    Args:
        loaded: a quantised base that computes in fp16; its ``compute`` is changed.
        model: the base with its adapter.
        rows: training rows.
    """
    training = model.training
    model.eval()
    size, name = largest_product(model, rows)
    model.train(training)
    short = name.removeprefix("base_model.model.")
    found = f"the largest number at a linear layer is {size:.3g}, at {short}; fp16 ends at {LARGEST:.0f}"
    dtype, reason = torch.float16, f"{found}; the residual stream is fp32"
    if not size <= LARGEST / MARGIN:  # NaN too
        dtype, reason = torch.float32, f"{found}, which leaves no room"
        compute_in(loaded.model, dtype)
    loaded.compute = Compute(loaded.compute.device, dtype, reason)
    return reason
