"""Owns how many layers are recomputed in the backward pass: the first ones alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from halfbyte.model.skeleton import layer_list


def recompute_first(model: PreTrainedModel, num_layers: int) -> None:
    """Make ``gradient_checkpointing_enable`` switch on the first ``num_layers`` layers alone, in place.

    transformers and TRL call that method wherever they see fit, and it switches on all layers.
    """
    enable_all: Any = model.gradient_checkpointing_enable

    def enable_first(*args: Any, **options: Any) -> None:
        enable_all(*args, **options)
        layer: Any
        for layer in layer_list(model)[num_layers:]:
            # Internal to transformers, tried with 5.23: GradientCheckpointingLayer reads this flag in each
            # call, and no argument chooses layers. Can go when one does.
            layer.gradient_checkpointing = False

    model.gradient_checkpointing_enable = enable_first
