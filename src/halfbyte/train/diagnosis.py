"""Owns finding out what made a step not finite: a weight of the base or the adapter, a row, or a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from halfbyte.config import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

    from halfbyte.data.samples import Samples
    from halfbyte.train.batching import Cutting

MAX_NAMED = 5


class Guarded(Protocol):
    """The attributes of the trainer that guards read.

    Attributes:
        model: the model with its adapter.
        accelerator: reports whether the last optimizer step was skipped.
        run: the config.
        checkpoints: folder of all checkpoints.
        cutting: how rows are divided into passes.
        samples: the training rows.
        step_rows: numbers of the rows of the step under way.
        trained: the weights that are trained.
        finite: whether all losses of the step so far are finite; None before its first pass.
        gradient_norm: of all gradients of the step, before they are clipped.
    """

    model: torch.nn.Module
    accelerator: Accelerator
    run: Run
    checkpoints: Path
    cutting: Cutting
    samples: Samples
    step_rows: Sequence[int]
    trained: list[torch.Tensor]
    finite: torch.Tensor | None
    gradient_norm: torch.Tensor

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Enter the autocast of training."""


def broken_weight(model: torch.nn.Module, *, trained: bool) -> str:
    """Return the name of a weight that holds NaN or infinity, among the trained ones or the others, or ""."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == trained:
            for tensor in (parameter, *_constants(parameter)):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    return name
    return ""


def why_not_finite(training: Guarded, numbers: Sequence[int]) -> tuple[str, bool]:
    """Return what is not finite in a step, and whether its settings may be the reason.

    Args:
        training: the trainer, with the weights that the step began with.
        numbers: numbers of the rows of the step.
    """
    for trained, owner in ((False, "the base's"), (True, "the adapter's")):
        name = broken_weight(training.model, trained=trained)
        if name:
            return f"{owner} weight {name} holds NaN or infinity in memory", False
    places = {number: training.samples[number].row.place for number in numbers}
    bad = [number for number in numbers if not math.isfinite(_loss(training, number))]
    if not bad:
        return (
            f"the loss or a gradient is NaN or infinite; the rows are {named(places.values())}",
            True,
        )
    layer = _first_layer(training, bad[0])
    where = f", first in the output of {layer}" if layer else ""
    return f"the loss of {named(places[number] for number in bad)} is NaN or infinite{where}", True


def _loss(training: Guarded, number: int) -> float:
    with training.compute_loss_context_manager():
        ((loss, _),) = training.cutting.losses(training.model, [training.samples.tokens[number]])
    return loss


def _first_layer(training: Guarded, number: int) -> str:
    """Return the name of the first module whose output is not finite for a row, or ""."""
    names: list[str] = []

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not names and isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                names.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in training.model.named_modules()]
    try:
        _loss(training, number)
    finally:
        for handle in hooks:
            handle.remove()
    return names[0] if names else ""


def _constants(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the constants that unpack a 4-bit or 8-bit weight."""
    state: Any = getattr(parameter, "quant_state", None)
    while state is not None:
        yield state.absmax
        state = getattr(state, "state2", None)
    scales = getattr(parameter, "SCB", None)
    if scales is not None:
        yield scales


def named(places: Iterable[str]) -> str:
    """Return the places of rows for a message, the first few of many."""
    shown = list(places)
    more = f" and {len(shown) - MAX_NAMED} more" if len(shown) > MAX_NAMED else ""
    return ", ".join(shown[:MAX_NAMED]) + more
