"""Owns the probe of a plan: the predicted memory of one real step compared with the measured one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.schema import Run
from halfbyte.data.prefix_tree import Layout
from halfbyte.data.prepare import prepare
from halfbyte.data.render import renderer_of
from halfbyte.errors import PlanError
from halfbyte.heap import release_pages
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.phases import BACKWARD, BACKWARD_END, FORWARD, HEAD
from halfbyte.plan.recompute import kept, peaks
from halfbyte.train.measure import measure, resident_bytes
from halfbyte.train.preflight import check_first_step
from halfbyte.train.setup import Setup, set_up
from halfbyte.train.trainer import TokenTrainer, build_trainer

if TYPE_CHECKING:
    from halfbyte.plan.devices import Device


@dataclass(frozen=True)
class Probe:
    """Measured and predicted memory of one step and one evaluation batch, in bytes."""

    loss: float
    predicted: dict[str, int]
    measured: dict[str, int]
    rss_bytes: int

    @property
    def error_frac(self) -> float:
        """The error of the predicted peak as a share of the measured one; positive if it is too high."""
        return self.predicted["peak"] / self.measured["peak"] - 1

    def as_json(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        return {
            "predicted_bytes": self.predicted,
            "measured_bytes": self.measured,
            "error_frac": self.error_frac,
            "rss_bytes": self.rss_bytes,
        }

    def as_text(self) -> str:
        """Return a table for a terminal."""
        lines = [f"{'MB':<34}{'predicted':>12}{'measured':>12}{'off by':>9}"]
        for name, predicted in self.predicted.items():
            measured = self.measured[name]
            off = f"{predicted / measured - 1:+.2%}" if measured else ""
            lines.append(f"  {name:<32}{predicted / 1e6:>12.2f}{measured / 1e6:>12.2f}{off:>9}")
        lines.append(f"  {'resident size of the process':<32}{'':>12}{self.rss_bytes / 1e6:>12.2f}")
        return "\n".join(lines)


def first_look(trainer: TokenTrainer, setup: Setup) -> tuple[str, dict[str, Any]]:
    """Check the first step before training; return lines to print and fields for the manifest.

    Raises:
        RunError, PlanError: as ``probe``.
    """
    if setup.plan is None:
        loss, _ = check_first_step(trainer, profiled=False)
        return f"before step 1: loss {loss:.3f} on the longest rows, gradients finite", {}
    result = probe(trainer, setup, profiled=False)
    release_pages()
    lines = (
        f"before step 1: loss {result.loss:.3f} on the longest rows, gradients finite\n"
        f"memory: {result.measured['peak'] / 1e9:.3f} GB measured, {result.error_frac:+.1%} off plan"
    )
    memory = setup.plan.as_json() | {"probe": result.as_json()}
    if trainer.tracker is not None:
        trainer.tracker.summarise({"memory": memory})
    return lines, {"memory": memory}


def probe(trainer: TokenTrainer, setup: Setup, *, profiled: bool = True) -> Probe:
    """Run the longest micro-batch forward and backward, and score an evaluation batch.

    Raises:
        RunError: as ``check_first_step``.
        PlanError: there is no plan, or the measured peak plus the optimizer's states would not fit.
    """
    planner, plan = setup.planner, setup.plan
    if planner is None or plan is None:
        raise PlanError("there is no plan to compare a probe with")
    loss, step = check_first_step(trainer, profiled=profiled)
    scored = trainer.cutting.longest(trainer.held_out or trainer.rows)

    def score() -> Any:
        with trainer.accelerator.autocast():
            return trainer.cutting.losses(trainer.model, scored)

    evaluation = measure(trainer.args.device, score, profiled=profiled)
    trained = trainer.cutting.layout(trainer.cutting.longest(trainer.rows))
    predicted = _predicted(planner, plan, trained, trainer.cutting.layout(scored))
    measured = {
        "weights and adapter": step.start_bytes,
        "kept for the backward pass": step.kept_bytes,
        "peak of the forward pass": step.forward_bytes,
        "peak of the backward pass": step.backward_bytes,
        "gradients": step.end_bytes - step.start_bytes,
        "peak of an evaluation batch": evaluation.peak_bytes,
        "peak": step.peak_bytes,
    }
    result = Probe(loss, predicted, measured, resident_bytes())
    # The plan also counts what the probe lacks: optimizer states, kept gradients and DDP's buckets.
    extra_bytes = planner.sharing_processes * (step.peak_bytes - predicted["peak"])
    if extra_bytes > planner.margin_bytes(plan) and not planner.run.train.ignore_plan:
        raise PlanError(
            f"the probe took {step.peak_bytes / 1e9:.2f} GB where {predicted['peak'] / 1e9:.2f} were"
            f" planned; with the optimizer's states {planner.device.title} has no room for that. Set"
            " a smaller train.micro_batch_size or train.checkpointing=on; train.ignore_plan=true"
            " trains in spite of it"
        )
    return result


def _predicted(
    planner: Planner, plan: TrainPlan, trained: Layout, evaluated: Layout
) -> dict[str, int]:
    """Predict the same two passes, without an optimizer and without earlier gradients."""
    fixed = planner.fixed_bytes()
    start = sum(fixed[name] for name in ("weights", "constants", "adapter", "workspace"))
    shape = plan.shape.alone().with_layout(trained)
    scored = shape.with_layout(evaluated)
    most = {phase: peak.total_bytes for phase, peak in peaks(planner.step, shape).items()}
    forward = start + max(most[FORWARD], most[HEAD])
    backward = start + max(most[BACKWARD], most[BACKWARD_END])
    return {
        "weights and adapter": start,
        "kept for the backward pass": kept(planner.step, shape),
        "peak of the forward pass": forward,
        "peak of the backward pass": backward,
        "gradients": 4 * planner.step.num_trainable,
        "peak of an evaluation batch": start + planner.step.evaluation(scored).total_bytes,
        "peak": max(forward, backward),
    }


def probe_run(run: Run, device: Device) -> Probe:
    """Load a run's model and rows and compare one step with its plan, without training or saving.

    Raises:
        UserError: ``halfbyte train`` would raise it for the same config.
    """
    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens)
    renderer = renderer_of(run.data, load_tokenizer(base))
    prepared = prepare(run.data, renderer, run.seed)
    # A single step needs no evaluation, so missing held-out rows must not be an error.
    quiet = run.model_copy(update={"train": run.train.model_copy(update={"eval_steps": 0})})
    with tempfile.TemporaryDirectory(prefix="halfbyte-probe-") as scratch:
        setup = set_up(quiet, base, renderer, prepared, device, Path(scratch))
        return probe(build_trainer(setup, Path(scratch), None), setup)
