"""Passes in 16 bits as on CUDA: hardly further from fp32 than the plain padded computation in the same dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import NONE, ROWS, outcome
from torch import nn

from halfbyte.config.schema import Adapter, Speed
from halfbyte.data.encoded import IGNORED
from halfbyte.data.prefix_tree import Tokens
from halfbyte.forward.fuse import fuse
from halfbyte.forward.packed import add_token_loss
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base

CARDS = {torch.bfloat16: "9.0", torch.float16: "7.5"}
FACTOR = 1.5
SEEDS = range(4)
LONG: list[Tokens] = [
    ([*range(3, 3 + size)], [IGNORED] * (size // 2) + [*range(3 + size // 2, 3 + size)])
    for size in (90, 61, 33)
]


def in_dtype(folder: Path, speed: Speed, dtype: torch.dtype, seed: int, scratch: Path) -> Any:
    """A base in NF4 with an adapter that already does something, whose products are in ``dtype``."""
    compute = Compute(torch.device("cpu"), dtype, "test")
    loaded = load_model(resolve_base(str(folder)), "nf4", compute=compute)
    model = attach_adapter(loaded, Adapter(r=4), seed, scratch)
    torch.manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    assert not add_token_loss(loaded.model, labelled_head=speed.labelled_head)
    fuse(model, speed, dtype)
    return model


def result(
    folder: Path, speed: Speed, dtype: torch.dtype, seed: int, rows: list[Tokens], scratch: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss a token, and all gradients as one vector."""
    model = in_dtype(folder, speed, dtype, seed, scratch)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, gradients = outcome(model, rows, speed)
    tokens = sum(label != IGNORED for _, labels in rows for label in labels[1:])
    return torch.tensor(float(loss) / tokens), torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize("rows", [ROWS, LONG], ids=["nested prefixes", "longer than the window"])
@pytest.mark.parametrize("dtype", CARDS, ids=str)
@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_gemma_vision"])
def test_distance_from_fp32_is_that_of_the_plain_computation(
    model_name: str,
    dtype: torch.dtype,
    rows: list[Tokens],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue(model_name)
    gaps: dict[str, list[torch.Tensor]] = {"plain": [], "ours": []}
    losses: dict[str, list[float]] = {"plain": [], "ours": []}
    for seed in SEEDS:
        monkeypatch.delenv("HALFBYTE_CAPABILITY", raising=False)
        exact_loss, exact = result(folder, NONE, torch.float32, seed, rows, tmp_path)
        plain = result(folder, NONE, dtype, seed, rows, tmp_path)
        monkeypatch.setenv("HALFBYTE_CAPABILITY", CARDS[dtype])
        ours = result(folder, Speed(), dtype, seed, rows, tmp_path)
        for name, (loss, gradient) in (("plain", plain), ("ours", ours)):
            gaps[name].append((gradient - exact).norm() / exact.norm())
            losses[name].append(float((loss - exact_loss).abs()))
    gap = {name: float(torch.stack(one).mean()) for name, one in gaps.items()}
    loss_gap = {name: sum(one) / len(one) for name, one in losses.items()}
    assert gap["ours"] <= FACTOR * gap["plain"]
    assert loss_gap["ours"] <= max(FACTOR * loss_gap["plain"], 1e-3)
