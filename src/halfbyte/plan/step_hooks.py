"""Owns the hooks on a traced step: which gradients are finished, and where the logits come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfbyte.forward.packed import is_linear_head
from halfbyte.plan.live import LiveBytes
from halfbyte.plan.phases import BACKWARD_END, GRADIENTS, WORKING


def gradient_hooks(
    live: LiveBytes, parameters: list[nn.Parameter], first: list[nn.Parameter]
) -> list[Any]:
    """Count finished gradients as gradients, and begin the last phase when only ``first`` lack theirs."""
    missing = {id(p) for p in parameters} - {id(p) for p in first}

    def finished(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        live.move(parameter.grad, GRADIENTS)
        missing.discard(id(parameter))
        if not missing:
            live.enter(BACKWARD_END, WORKING)

    return [p.register_post_accumulate_grad_hook(finished) for p in parameters]  # type: ignore[no-untyped-call]


def logits_are_the_heads(model: Any, run: Callable[[], torch.Tensor]) -> bool:
    """Return whether the logits are the head's product of the last hidden states, with at most a soft cap.

    Args:
        model: on fake tensors.
        run: gives its logits for a few tokens.
    """
    head: Any = model.get_output_embeddings()
    if not is_linear_head(head):
        return False
    captured: dict[str, Any] = {}

    def storage(tensor: torch.Tensor) -> int:
        address: int = tensor.untyped_storage()._cdata
        return address

    def base_hook(_: Any, __: Any, out: Any) -> None:
        captured["hidden"] = getattr(out, "last_hidden_state", None)

    def before_head(_: Any, inputs: Any) -> None:
        captured["input"] = inputs[0]

    def head_hook(_: Any, __: Any, out: Any) -> None:
        captured["product"] = out

    hooks = [
        model.base_model.register_forward_hook(base_hook),
        # It runs first, before any hook that casts the input.
        head.register_forward_pre_hook(before_head, prepend=True),
        head.register_forward_hook(head_hook),
    ]
    logits = run()
    for hook in hooks:
        hook.remove()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if captured.get("hidden") is None or "input" not in captured:
        return False  # the model bypasses its base model
    same_input = storage(captured["input"]) == storage(captured["hidden"])
    return same_input and (cap is not None or storage(logits) == storage(captured["product"]))
