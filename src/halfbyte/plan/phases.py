"""Owns the names of a step's phases and of the terms of its memory."""

from __future__ import annotations

FORWARD, HEAD, BACKWARD, BACKWARD_END = PHASES = (
    "forward pass",
    "loss head",
    "start of the backward pass",
    "end of the backward pass",
)
EVALUATION = "evaluation"
ACTIVATIONS, LOGITS, WORKING, GRADIENTS = "activations", "logits", "working_set", "gradients"
