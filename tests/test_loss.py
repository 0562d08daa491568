"""The loss on labelled tokens: equal to the plain cross-entropy, in value and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.data.render import IGNORED
from halfbyte.model.loss import TokenLoss, add_token_loss, pad_right, row_losses, tile_rows


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
    token_loss(hidden, head, labels, softcap, range(0, num_rows, 3)).sum().mul(0.37).backward()
    gradient, hidden.grad = hidden.grad, None
    assert gradient is not None

    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.autograd.backward(wanted * 0.37)
    value = token_loss(hidden, head, labels, softcap, range(0, num_rows, 3)).sum()
    assert exact.grad is not None
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=5e-6)


def test_tile_of_a_large_vocabulary_stays_small() -> None:
    assert tile_rows(49_152, "cpu") * 49_152 * 4 <= 24 << 20
    assert tile_rows(262_144, "cpu") == 32  # never so few rows that the product starves


def test_model_loss_equals_transformers_own(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = [([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]), ([5, 6, 7], [IGNORED, 6, 7])]
    batch = pad_right(rows, pad_id=2)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    wanted = model(**batch, attention_mask=mask).loss * 5
    wanted.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    assert add_token_loss(model) is True
    found = model(**batch, token_loss="sum")
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.grad, gradient, rtol=1e-4, atol=1e-6
    )


def test_other_calls_are_untouched(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids, labels=ids)
    add_token_loss(model)
    after = model(ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_head_that_scales_its_logits_falls_back_to_the_model_s_own(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **options: object) -> object:
            out = super().forward(*args, **options)
            out.logits = out.logits * 3.0
            return out

    model.__class__ = Scaled
    assert add_token_loss(model) is False
    batch = pad_right([([5, 6, 7, 8], [IGNORED, 6, 7, 8])], pad_id=2)
    logits = Scaled.forward(model, batch["input_ids"]).logits  # type: ignore[attr-defined]
    wanted = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    torch.testing.assert_close(model(**batch, token_loss="sum"), wanted)


def test_row_losses_do_not_depend_on_batching(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    add_token_loss(model)
    model.train()
    rows = [(list(range(5, 5 + n)), [IGNORED, *range(6, 5 + n)]) for n in (3, 9, 4, 7, 5)]
    alone, pairs, together = (row_losses(model, rows, 2, size) for size in (1, 2, 5))
    assert [count for _, count in alone] == [len(ids) - 1 for ids, _ in rows]
    for other in (pairs, together):
        assert [count for _, count in other] == [count for _, count in alone]
        torch.testing.assert_close(
            torch.tensor([loss for loss, _ in other]), torch.tensor([loss for loss, _ in alone])
        )
    assert model.training
