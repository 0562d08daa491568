"""Owns the setup of a training: rows, base, adapter and plan, all decided before a trainer is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config import Run
from halfbyte.data.prepared import Prepared, empty_shares
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Samples
from halfbyte.errors import RunError
from halfbyte.model.adapter import attach_adapter
from halfbyte.model.load import Loaded, load_config, load_for_training, read_config
from halfbyte.model.new_tokens import new_ids
from halfbyte.model.resolve import Base
from halfbyte.plan.gate import gate
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.shape import Lengths
from halfbyte.train.arguments import Passes
from halfbyte.train.settle_dtype import settle_compute
from halfbyte.train.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from peft import PeftModel

    from halfbyte.plan.devices import Device

# Most test rows used in place of validation rows, to keep the held-out loss during training cheap.
MAX_STAND_INS = 64


@dataclass(frozen=True)
class Setup:
    """Everything that a trainer is built from.

    Attributes:
        run: the config, with its compute dtype decided.
        renderer: the renderer of the training rows.
        train: the training rows.
        held_out: rows on which the loss is measured during training; may be empty.
        loaded: the base.
        model: the base with its new adapter.
        passes: how an optimizer step is split into forward passes.
        planner: counts this run's memory; None if nothing was planned.
        plan: the planner's result; None if the model cannot be planned and ``train.ignore_plan`` is set.
    """

    run: Run
    renderer: Renderer
    train: Samples
    held_out: Samples
    loaded: Loaded
    model: PeftModel
    passes: Passes
    planner: Planner | None = None
    plan: TrainPlan | None = None

    @property
    def summary(self) -> str:
        """A one-line summary of the plan, or "" without one."""
        if self.plan is None or self.planner is None:
            return ""
        spare_bytes = self.planner.margin_bytes(self.plan)
        return f"plan: {self.plan.summary()}; {spare_bytes / 1e9:.2f} GB to spare"

    def as_json(self) -> dict[str, Any]:
        """Return the plan for the manifest; the dict is empty without one."""
        return {"memory": self.plan.as_json()} if self.plan else {}


def set_up(
    run: Run,
    base: Base,
    renderer: Renderer,
    prepared: Prepared,
    device: Device,
    scratch: Path,
    *,
    is_main: bool = True,
) -> Setup:
    """Plan a training, load its base and put a new adapter on it.

    Args:
        run: the config, with ``auto`` where the plan or the rows decide.
        base: the model to train.
        renderer: the renderer that produced ``prepared``.
        prepared: the rows; the loss is measured on the validation rows, else on the first test rows.
        device: the device to train on.
        scratch: folder for the start values of initialisations that change the base.
        is_main: whether this process writes them.

    Raises:
        RunError: evaluations are configured, but no row is held out, or a share holds out none.
        PlanError: the training cannot fit into memory.
        ModelError: tokens of the rows have no row in the embedding, the base cannot be loaded, or the adapter
            cannot be placed.
    """
    for line in empty_shares(prepared, run.data):
        raise RunError(line)
    held_out = loss_rows(prepared)
    if run.train.eval_steps and not held_out:
        raise RunError(
            f"train.eval_steps is {run.train.eval_steps}, but of {len(prepared.train)} rows none fell into"
            " the held-out part; raise data.validation_frac or set train.eval_steps=0"
        )
    lengths, held_out_lengths = row_lengths(prepared.train), row_lengths(held_out)
    config = load_config(base)
    parts = [prepared.train, held_out]
    published = read_config(Path(base.path), base.name)
    check_vocabulary(base.name, published, renderer, parts, new_ids(renderer.tokenizer, base))
    planner, plan = gate(run, config, device, lengths, held_out_lengths)
    loaded = load_for_training(base, run.model)
    model = attach_adapter(loaded, run.adapter, run.training_seed, scratch, is_main=is_main)
    settled = settle_compute(run, loaded, model, prepared.train)
    if settled is not run:
        planner, plan = gate(settled, planner.config, device, lengths, held_out_lengths)
    passes = Passes.of(settled, plan)
    return Setup(settled, renderer, prepared.train, held_out, loaded, model, passes, planner, plan)


def loss_rows(prepared: Prepared) -> Samples:
    """Return the rows for the held-out loss during training: validation rows, else some test rows."""
    return prepared.validation or prepared.test[:MAX_STAND_INS]


def row_lengths(samples: Samples) -> Lengths:
    """Return the numbers of tokens and labelled tokens of each row, longest first."""
    return Lengths.of(samples.tokens)
