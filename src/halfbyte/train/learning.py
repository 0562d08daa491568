"""Owns what stops a training whose steps teach nothing, with the most likely cause."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.errors import RunError
from halfbyte.train.diagnosis import Guarded
from halfbyte.train.guards import QUARTER, way_on

MAX_STILL_STEPS = 3  # steps in a row whose gradient is zero
FIRST_LOOK_STEPS = 4  # after the warm-up
LOOK_STEPS = 50  # between two looks at how far the adapter has moved
# Entries of published weights are about 0.02, and fp32 keeps seven digits of them: a change of less is none.
LEAST_CHANGE = 1e-10
USUAL_RATE = "2e-4"
SPAN_STEPS, LEAST_LOSSES = (
    20,
    3,
)  # steps over which losses are looked at, and how many there must be
UNKNOWING_SPAN = 3  # times as many, where the model began without knowledge
CHANCE_FRAC, KNOWING_FRAC = (
    0.98,
    0.9,
)  # of ln(V): the loss of one who knows nothing, and of one who knows something


class LearningGuard(TrainerCallback):
    """Stops the run where steps teach nothing: gradients of zero, an adapter that stands still, a destroyed model."""

    def __init__(self, training: Guarded) -> None:
        self.training = training
        self.chance_loss = math.inf  # ln(V), in nats per token
        self.num_still = torch.zeros((), device=training.trained[0].device)
        self.first: tuple[int, float] | None = None  # logged loss, with its step
        self.losses: list[tuple[int, float]] = []  # those of the longest span that is looked at

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Read the size of the vocabulary."""
        embedding: Any = self.training.model.get_input_embeddings()  # type: ignore[operator]
        self.chance_loss = math.log(embedding.weight.shape[0])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Count the steps in a row whose gradient is zero, on the device."""
        still = self.training.gradient_norm.to(self.num_still.device) == 0
        self.num_still = (self.num_still + 1) * still

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Look at gradients where they are logged anyway, and at the adapter now and then.

        Raises:
            RunError: the gradients are zero, or the adapter changes nothing.
        """
        step = state.global_step
        if control.should_log and int(self.num_still) >= MAX_STILL_STEPS:
            raise RunError(
                f"step {step}: the gradient of all adapter weights has been zero for {int(self.num_still)} steps, so"
                f" that nothing is learnt. {_why_still(self.training)}"
            )
        warm = args.get_warmup_steps(state.max_steps)  # whose first rate is 0
        is_last = step == state.max_steps and step > warm + 1
        if step == warm + FIRST_LOOK_STEPS or step % LOOK_STEPS == 0 or is_last:
            self._check_moved(step)

    def _check_moved(self, step: int) -> None:
        change = largest_change(self.training.model)
        if change is not None and change < LEAST_CHANGE:
            raise RunError(
                f"step {step}: the adapter changes no weight of the base by more than {change:.1e}, less than rounding"
                f" does, so that nothing is learnt. {_why_still(self.training)}"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        """Look at the logged losses.

        Raises:
            RunError: they stay where a model is that knows nothing.
        """
        if not logs or "loss" not in logs:
            return
        step, loss = state.global_step, logs["loss"]
        self.first = self.first or (step, loss)
        first_step, first_loss = self.first
        oldest = step - UNKNOWING_SPAN * SPAN_STEPS
        self.losses = [known for known in self.losses if known[0] > oldest] + [(step, loss)]
        knew = first_loss < KNOWING_FRAC * self.chance_loss
        span = SPAN_STEPS if knew else UNKNOWING_SPAN * SPAN_STEPS
        recent = [value for at, value in self.losses if at > step - span]
        if step - first_step < span or len(recent) < LEAST_LOSSES:
            return
        stands = abs(recent[-1] - recent[0]) < (1 - CHANCE_FRAC) * self.chance_loss
        if min(recent) >= CHANCE_FRAC * self.chance_loss and (knew or stands):
            raise RunError(
                f"step {step}: for {span} steps the loss has been {loss:.2f} nats, where a model is that"
                f" knows nothing (ln of the vocabulary is {self.chance_loss:.2f}; it began at {first_loss:.2f})."
                f" {_why_still(self.training)}"
            )


@torch.no_grad()
def largest_change(model: torch.nn.Module) -> float | None:
    """Return a bound on how far LoRA changes the entries of a weight, the largest over all layers.

    It is |alpha/r| ‖B‖ ‖A‖ / √(mn), the root mean square of BA at most. None if weights other than those of LoRA are
    trained too, or B did not begin at zero.
    """
    layers: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)
    ]
    trained = sum(p.requires_grad for p in model.parameters())
    changes: list[torch.Tensor] = []
    matrices = 0
    for layer in layers:
        for name, scale in layer.scaling.items():
            if name not in layer.lora_A:
                return None
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            matrices += 2
            changes.append(abs(scale) * a.norm() * b.norm() / math.sqrt(a.shape[1] * b.shape[0]))
    if trained > matrices or not changes:
        return None
    return float(torch.stack(changes).max())


def _why_still(training: Guarded) -> str:
    """Return the most likely reasons why nothing is learnt, and the command that starts without them."""
    train, adapter = training.run.train, training.run.adapter
    root = math.sqrt(adapter.r) if adapter.rslora else adapter.r
    usual = (  # a setting, what it is divided by, usual values, and the one to take
        ("adapter.alpha", adapter.alpha, root, (1e-6, 1e3), f"{root:g}"),
        ("train.learning_rate", train.learning_rate, 1, (1e-9, 1e-2), USUAL_RATE),
        ("train.max_grad_norm", train.max_grad_norm, 1, (1e-6, math.inf), "1"),
    )
    causes = [
        (f"{key} {value:g} is too {'small' if value / unit < least else 'high'}", f"{key}={remedy}")
        for key, value, unit, (least, most), remedy in usual
        if not least <= value / unit <= most
    ]
    if not causes:
        rate = train.learning_rate
        causes = [
            (f"train.learning_rate {rate:g} is too high", f"train.learning_rate={rate * QUARTER:g}")
        ]
    why = " and ".join(text for text, _ in causes)
    changes = " ".join(change for _, change in causes)
    return f"Most likely {why}. {way_on(training.checkpoints.parent, changes, anew=True)}"
