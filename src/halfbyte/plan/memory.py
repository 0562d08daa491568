"""Owns the memory that training needs on a device: its terms, its peak, and the phase of the peak."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from halfbyte.config.schema import Optimizer, Run
from halfbyte.errors import PlanError
from halfbyte.host import num_processes
from halfbyte.model.precision import DTYPES, NAMES, choose_compute
from halfbyte.model.skeleton import build
from halfbyte.plan.devices import Device
from halfbyte.plan.live import DEQUANTISED
from halfbyte.plan.phases import ACTIVATIONS, EVALUATION, GRADIENTS, LOGITS, WORKING
from halfbyte.plan.recompute import largest_terms, peaks
from halfbyte.plan.shape import Lengths, StepShape
from halfbyte.plan.step import TracedStep
from halfbyte.plan.weights import Stored, load_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What an allocator holds beyond live tensors, as a fraction of the terms in ``MOVING``. CUDA: the memory
# reserved beyond what is allocated in public out-of-memory messages is 1 to 10 %. CPU: freed blocks that the
# C library keeps; 12 steps of the quickstart took 3.27 GB, of which 1.26 were tensors and 1.10 the process
# (fp32), or 2.46 GB, of which 0.91 were tensors (bf16).
SLACK_FRAC = {"cuda": 0.1, "cpu": 0.9}
OPTIMIZER_STEP = "optimizer step"
SMALL_STATE = 4096  # bitsandbytes keeps the state of smaller parameters in fp32
STATE_BLOCK = 256  # 8-bit states that share one fp32 maximum
FIXED = ("weights", "constants", "adapter", "optimizer", "workspace", "buckets")
MOVING = (GRADIENTS, ACTIVATIONS, LOGITS, DEQUANTISED, WORKING)
# Number of states for each trainable weight, and whether they are stored in 8 bits.
STATES: dict[Optimizer, tuple[int, bool]] = {
    "adamw_torch": (2, False),
    "adamw_torch_fused": (2, False),
    "paged_adamw_32bit": (2, False),
    "adamw_8bit": (2, True),
    "paged_adamw_8bit": (2, True),
    "ademamix_8bit": (3, True),
    "lion_8bit": (1, True),
    "paged_lion_8bit": (1, True),
    "sgd": (0, False),
}
NUM_MAPS = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "ademamix_8bit": 2}
MAP_BYTES = 4 * 256


@dataclass(frozen=True)
class TrainPlan:
    """Holds the settings of a training run and the memory that they need on a device.

    Attributes:
        terms: bytes of each term at the peak; their sum is ``peak_bytes``.
        largest: the most bytes of each term by itself, at any time.
        when: the phase of the step in which the peak comes.
        phases: the most bytes of each phase.
        peak_bytes: the most bytes of all tensors; on CUDA what ``max_memory_allocated`` counts.
        paged_bytes: optimizer states that may move to the host's memory; no other figure includes them.
        context_bytes: what the process takes besides tensors.
        slack_bytes: what an allocator may hold beyond what is allocated.
        needed_bytes: the sum of peak, context and slack.
    """

    micro_batch_size: int
    accumulation: int
    shape: StepShape
    compute_dtype: str
    num_trainable: int
    terms: dict[str, int]
    largest: dict[str, int]
    when: str
    phases: dict[str, int]
    paged_bytes: int
    context_bytes: int
    slack_bytes: int

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return self.shape.lengths[0]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.shape.checkpointing

    @property
    def recompute(self) -> int | Literal["on", "off"]:
        """The value for ``train.checkpointing``: a number of first layers, ``on`` (all) or ``off``."""
        if not self.checkpointing:
            return "off"
        return "on" if self.shape.recompute is None else self.shape.recompute

    @property
    def peak_bytes(self) -> int:
        """The most bytes of tensors that are live at once."""
        return sum(self.terms.values())

    @property
    def held_bytes(self) -> int:
        """The most bytes that the allocator holds."""
        return self.peak_bytes + self.slack_bytes

    @property
    def needed_bytes(self) -> int:
        """The bytes that the device must have."""
        return self.held_bytes + self.context_bytes

    def summary(self) -> str:
        """Describe the plan in one line."""
        return (
            f"{self.micro_batch_size} rows × {self.accumulation} passes per step, checkpointing"
            f" {checkpointing_text(self.recompute)}, peak {self.peak_bytes / 1e9:.3f} GB"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the plan for the manifest."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation,
            "checkpointing": self.recompute,
            "predicted_peak_bytes": self.peak_bytes,
            "needed_bytes": self.needed_bytes,
            "terms": self.terms,
        }


class Planner:
    """Plans a run's model on a device at any micro-batch size; the model is built once.

    Args:
        run: the config.
        config: the model's configuration.
        device: the device to run on.
        step: the traced step of another plan with the same model, precision, adapter and device.
        held_out: rows that are evaluated during training, if any.

    Raises:
        ModelError: no model can be built, or its step cannot be traced.
        PlanError: the device cannot compute in the dtype that the config sets.
    """

    def __init__(
        self,
        run: Run,
        config: PretrainedConfig,
        device: Device,
        step: TracedStep | None = None,
        held_out: Lengths | None = None,
    ) -> None:
        self.run, self.config, self.device = run, config, device
        self.dtype = compute_dtype(run, device)
        whole = build(config, self.dtype, text_only=True)
        model = run.model
        self.stored: Stored = load_bytes(whole, model.precision, model.double_quant, self.dtype)
        if run.model.attention == "flash_attention_2" and not device.has_flash:
            raise PlanError(
                f"{device.title} does not support flash attention (it needs compute capability 8.0); set"
                " model.attention=sdpa"
            )
        self.held_out = held_out
        self._shared_step = step
        self.world = num_processes()

    @functools.cached_property
    def step(self) -> TracedStep:
        """The traced step, built on first use."""
        return self._shared_step or TracedStep(
            self.config,
            self.run.model,
            self.run.adapter,
            self.run.allowed_speed,
            self.dtype,
            self.device.capability,
            num_new_tokens=len(self.run.data.new_tokens),
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of the model."""
        return len(self.step.kinds)

    @property
    def loads(self) -> bool:
        """Whether the weights alone fit on the device."""
        return self.stored.true_bytes <= self.device.usable_bytes

    def train(
        self,
        lengths: Lengths,
        micro_batch_size: int,
        *,
        checkpointing: bool,
        recompute: int | None = None,
    ) -> TrainPlan:
        """Plan training with a micro-batch of this many rows.

        ``recompute``: with ``checkpointing``, the number of first layers to recompute; None: all.
        """
        accumulation = self.run.train.batch_size // (micro_batch_size * self.world)
        shape = lengths.shape(
            micro_batch_size,
            checkpointing=checkpointing,
            accumulates=accumulation > 1,
            share=self.step.shares,
        )
        if checkpointing and recompute is not None and recompute < self.num_layers:
            shape = replace(shape, recompute=recompute)
        fixed, paged_bytes = self.fixed_bytes(), self.paged_bytes()
        moving = {phase: dict(peak.terms) for phase, peak in peaks(self.step, shape).items()}
        moving[OPTIMIZER_STEP] = self._optimizer_step()
        evaluated = self.evaluation_shape(micro_batch_size, checkpointing=checkpointing)
        if evaluated is not None:
            moving[EVALUATION] = dict(self.step.evaluation(evaluated).terms)
        phases = {phase: sum(terms.values()) for phase, terms in moving.items()}
        when = max(phases, key=lambda phase: phases[phase])
        terms = {name: moving[when].get(name, 0) for name in MOVING}
        traced = largest_terms(self.step, shape)
        largest = {name: max(traced[name], moving[OPTIMIZER_STEP].get(name, 0)) for name in MOVING}
        fixed_total = sum(fixed.values())
        return TrainPlan(
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            shape=shape,
            compute_dtype=NAMES[self.dtype],
            num_trainable=self.step.num_trainable,
            terms=fixed | terms,
            largest=fixed | largest,
            when=when,
            phases={phase: fixed_total + size for phase, size in phases.items()},
            paged_bytes=paged_bytes,
            context_bytes=self.device.context_bytes,
            slack_bytes=int(SLACK_FRAC[self.device.kind] * phases[when]),
        )

    def evaluation_shape(self, micro_batch_size: int, *, checkpointing: bool) -> StepShape | None:
        """Return the largest batch of held-out rows that is evaluated at once, if there are any."""
        if self.held_out is None or not self.held_out.rows:
            return None
        return self.held_out.shape(
            micro_batch_size,
            checkpointing=checkpointing,
            accumulates=False,
            share=self.step.shares,
        )

    def fits(self, plan: TrainPlan) -> bool:
        """Return whether the device has room for the plan besides what is already in use."""
        return self.margin_bytes(plan) >= 0

    def margin_bytes(self, plan: TrainPlan) -> int:
        """Return the bytes left over; negative if the plan does not fit."""
        needed_bytes = self.sharing_processes * plan.needed_bytes
        return self.device.total_bytes - self.device.in_use_bytes - needed_bytes

    @property
    def sharing_processes(self) -> int:
        """Number of processes that use the device's memory: on a CPU all of the machine, on a GPU one."""
        on_cpu = self.device.kind == "cpu"
        return int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world))) if on_cpu else 1

    def fixed_bytes(self) -> dict[str, int]:
        """Return the bytes that are live all the time, by term."""
        sizes = (
            self.stored.reported_bytes,
            self.stored.constants_bytes,
            (4 + self.step.copy_bytes) * self.step.num_trainable,
            self._states_bytes - self.paged_bytes(),
            self.device.workspace_bytes,
            4 * self.step.num_trainable if self.world > 1 else 0,
        )
        return dict(zip(FIXED, sizes, strict=True))

    def paged_bytes(self) -> int:
        """Return the bytes of optimizer states that CUDA's unified memory may move to the host."""
        pages = self.run.train.optimizer.startswith("paged") and self.device.kind == "cuda"
        return self._states_bytes if pages else 0

    @functools.cached_property
    def _states_bytes(self) -> int:
        name = self.run.train.optimizer
        states = self.step.over_trainable(lambda p: state_bytes(name, tuple(p.shape)))
        if STATES.get(name, (0, False))[1]:
            states += MAP_BYTES * NUM_MAPS.get(name, 1)
        return states

    def _optimizer_step(self) -> dict[str, int]:
        gradients = 4 * self.step.num_trainable
        # torch's multi-tensor AdamW holds a denominator for every weight; the fused one holds none.
        multi_tensor = self.run.train.optimizer == "adamw_torch" and self.device.kind == "cuda"
        return {GRADIENTS: gradients, WORKING: gradients if multi_tensor else 0}


def checkpointing_text(recompute: int | Literal["on", "off"]) -> str:
    """Return ``on``, ``off`` or ``on 7 layers``."""
    return recompute if isinstance(recompute, str) else f"on {recompute} layers"


def state_bytes(optimizer: Optimizer, shape: tuple[int, ...]) -> int:
    """Return the bytes of an optimizer's states for a trainable matrix in torch and bitsandbytes 0.50.

    An fp32 state takes 4 bytes a weight; an 8-bit state takes 1 byte, and 4 more for each block of 256
    (arXiv 2110.02861 §2); a matrix of fewer than 4,096 weights keeps fp32. Adafactor keeps a row and a
    column.
    """
    count = math.prod(shape)
    if optimizer == "adafactor":
        return 4 * (sum(shape) if len(shape) > 1 else count) + 4  # and the RMS
    num_states, is_8bit = STATES[optimizer]
    if is_8bit and count >= SMALL_STATE:
        return num_states * (count + 4 * -(-count // STATE_BLOCK))
    counter = 4 if optimizer in ("adamw_torch", "adamw_torch_fused") else 0  # the number of steps
    return num_states * 4 * count + counter


def compute_dtype(run: Run, device: Device) -> torch.dtype:
    """Return the dtype of this run's matrix products on this device, as ``choose_compute`` does.

    Raises:
        PlanError: the config sets bf16 for a card that only emulates it.
    """
    precision = run.model.precision
    setting = precision if precision in DTYPES else run.model.compute_dtype
    if device.capability is None:
        return choose_compute(setting, torch.device("cpu")).dtype  # type: ignore[arg-type]
    if setting == "bf16" and not device.has_bf16:
        raise PlanError(
            f"{device.title} only emulates bf16 (it needs compute capability 8.0); set"
            " model.compute_dtype to auto, fp32 or fp16, and model.precision to a quantised precision"
        )
    if setting != "auto":
        return DTYPES[setting]
    # Without bf16 a quantised base model trains in fp16, unless a probe of real rows shows that it cannot.
    return torch.bfloat16 if device.has_bf16 else torch.float16
