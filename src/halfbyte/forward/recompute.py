"""Owns how many layers are recomputed in the backward pass: the first ones alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from halfbyte.model.skeleton import layer_list


def recompute_first(model: PreTrainedModel, num_layers: int) -> None:
    """Let ``gradient_checkpointing_enable`` switch on the first layers alone.

    transformers and TRL call it wherever they see fit, and it switches on all of them.
    """
    enable: Any = model.gradient_checkpointing_enable

    def enable_first(*args: Any, **options: Any) -> None:
        enable(*args, **options)
        layer: Any
        for layer in layer_list(model)[num_layers:]:
            layer.gradient_checkpointing = False

    model.gradient_checkpointing_enable = enable_first
