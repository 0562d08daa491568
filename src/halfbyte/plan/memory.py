"""Owns the sum: what training takes on a device, each term by name, the peak and when it comes."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from halfbyte.config.schema import Optimizer, Run
from halfbyte.errors import PlanError
from halfbyte.model.precision import DTYPES, NAMES, choose_compute
from halfbyte.model.skeleton import build
from halfbyte.plan.devices import Device
from halfbyte.plan.live import DEQUANTISED
from halfbyte.plan.recompute import most, peaks
from halfbyte.plan.shape import Lengths, StepShape
from halfbyte.plan.step import ACTIVATIONS, EVALUATION, GRADIENTS, LOGITS, WORKING, TracedStep
from halfbyte.plan.weights import Stored, load_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What an allocator holds beyond what lives, as a share of what comes and goes. CUDA: reserved beyond
# allocated in public out-of-memory messages, 1 to 10 %. CPU: blocks that the C library keeps; 12 steps of
# the quickstart took 3.27 GB where 1.26 were tensors and 1.10 the process (fp32), 2.46 where 0.91 (bf16).
SLACK_FRAC = {"cuda": 0.1, "cpu": 0.9}
OPTIMIZER_STEP = "optimizer step"
SMALL_STATE = 4096  # bitsandbytes keeps the state of smaller parameters in fp32
STATE_BLOCK = 256  # and has one fp32 maximum for each so many 8-bit states
FIXED = ("weights", "constants", "adapter", "optimizer", "workspace", "buckets")
MOVING = (GRADIENTS, ACTIVATIONS, LOGITS, DEQUANTISED, WORKING)
# States for each trainable weight, and whether they take 8 bits.
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
    """What training takes on a device.

    Attributes:
        terms: bytes at the peak, by name; their sum is ``peak_bytes``.
        largest: the most that each term comes to by itself, whenever that is.
        when: the phase of the step in which the peak comes.
        phases: the most bytes of each phase.
        peak_bytes: of all tensors; on CUDA what ``max_memory_allocated`` counts.
        paged_bytes: optimizer states that may move to the host's memory, in no other figure.
        context_bytes: what the process takes beside tensors.
        slack_bytes: what an allocator may hold beyond what is asked of it.
        needed_bytes: peak, context and slack.
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
        """Tokens of the longest row."""
        return self.shape.lengths[0]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.shape.checkpointing

    @property
    def recompute(self) -> int | Literal["on", "off"]:
        """Of how many layers, from the first on, or ``on``: of all; as ``train.checkpointing`` takes it."""
        if not self.checkpointing:
            return "off"
        return "on" if self.shape.recompute is None else self.shape.recompute

    @property
    def peak_bytes(self) -> int:
        """Most bytes of tensors that live at once."""
        return sum(self.terms.values())

    @property
    def held_bytes(self) -> int:
        """What the allocator holds at most."""
        return self.peak_bytes + self.slack_bytes

    @property
    def needed_bytes(self) -> int:
        """What the device must have."""
        return self.held_bytes + self.context_bytes

    def summary(self) -> str:
        """The plan in a line."""
        return (
            f"{self.micro_batch_size} rows × {self.accumulation} passes a step, checkpointing"
            f" {layers_words(self.recompute)}, peak {self.peak_bytes / 1e9:.3f} GB"
        )

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation,
            "checkpointing": self.recompute,
            "predicted_peak_bytes": self.peak_bytes,
            "needed_bytes": self.needed_bytes,
            "terms": self.terms,
        }


class Planner:
    """Plans one run's model on one device at any micro-batch; models are built once.

    Args:
        run: the config.
        config: the model's configuration.
        device: where it shall run.
        step: that of another plan of the same model, precision, adapter and device.
        held_out: rows that are scored during training, if any.

    Raises:
        ModelError: no model can be built, or its step cannot be traced.
        PlanError: the device cannot compute in the dtype that the config asks for.
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
                f"{device.title} has no flash attention (compute capability 8.0 is needed); set"
                " model.attention=sdpa"
            )
        self.held_out = held_out
        self._given = step
        self.world = int(os.environ.get("WORLD_SIZE", "1"))

    @functools.cached_property
    def step(self) -> TracedStep:
        """The traced step, made when it is first asked for."""
        return self._given or TracedStep(
            self.config,
            self.run.model,
            self.run.adapter,
            self.run.allowed_speed,
            self.dtype,
            self.device.kind,
            flash=self.device.has_flash,
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.step.kinds)

    @property
    def loads(self) -> bool:
        """Whether there is room for the weights alone."""
        return self.stored.true_bytes <= self.device.usable_bytes

    def train(
        self,
        lengths: Lengths,
        micro_batch_size: int,
        *,
        checkpointing: bool,
        recompute: int | None = None,
    ) -> TrainPlan:
        """What training takes with so many rows in a micro-batch.

        ``recompute``: with ``checkpointing``, of how many layers from the first on; None: of all.
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
        scored = self.scored(micro_batch_size, checkpointing=checkpointing)
        if scored is not None:
            moving[EVALUATION] = dict(self.step.evaluation(scored).terms)
        phases = {phase: sum(terms.values()) for phase, terms in moving.items()}
        when = max(phases, key=lambda phase: phases[phase])
        terms = {name: moving[when].get(name, 0) for name in MOVING}
        highest = most(self.step, shape)
        largest = {name: max(highest[name], moving[OPTIMIZER_STEP].get(name, 0)) for name in MOVING}
        total = sum(fixed.values())
        return TrainPlan(
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            shape=shape,
            compute_dtype=NAMES[self.dtype],
            num_trainable=self.step.num_trainable,
            terms=fixed | terms,
            largest=fixed | largest,
            when=when,
            phases={phase: total + size for phase, size in phases.items()},
            paged_bytes=paged_bytes,
            context_bytes=self.device.context_bytes,
            slack_bytes=int(SLACK_FRAC[self.device.kind] * phases[when]),
        )

    def scored(self, micro_batch_size: int, *, checkpointing: bool) -> StepShape | None:
        """The largest batch of held-out rows that is scored at once, if any are."""
        if self.held_out is None or not self.held_out.rows:
            return None
        return self.held_out.shape(
            micro_batch_size,
            checkpointing=checkpointing,
            accumulates=False,
            share=self.step.shares,
        )

    def fits(self, plan: TrainPlan) -> bool:
        """Whether there is room for it on the device, beside what is in use there."""
        return self.margin_bytes(plan) >= 0

    def margin_bytes(self, plan: TrainPlan) -> int:
        """Bytes left over; negative where it does not fit."""
        needed_bytes = self.sharing * plan.needed_bytes
        return self.device.total_bytes - self.device.in_use_bytes - needed_bytes

    @property
    def sharing(self) -> int:
        """Processes that share the device's memory: those of a machine its RAM, while GPUs are many."""
        on_cpu = self.device.kind == "cpu"
        return int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world))) if on_cpu else 1

    def fixed_bytes(self) -> dict[str, int]:
        """Bytes that are there all the time, by name."""
        sizes = (
            self.stored.reported_bytes,
            self.stored.constants_bytes,
            4 * self.step.num_trainable,
            self._states_bytes - self.paged_bytes(),
            self.device.workspace_bytes,
            4 * self.step.num_trainable if self.world > 1 else 0,
        )
        return dict(zip(FIXED, sizes, strict=True))

    def paged_bytes(self) -> int:
        """Optimizer states that CUDA's unified memory may move to the host."""
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
        # torch's multi-tensor AdamW holds a denominator for every weight; the fused one none.
        listed = self.run.train.optimizer == "adamw_torch" and self.device.kind == "cuda"
        return {GRADIENTS: gradients, WORKING: gradients if listed else 0}


def layers_words(recompute: int | Literal["on", "off"]) -> str:
    """``on``, ``off`` or ``on 7 layers``."""
    return recompute if isinstance(recompute, str) else f"on {recompute} layers"


def state_bytes(optimizer: Optimizer, shape: tuple[int, ...]) -> int:
    """Bytes of an optimizer's states for one trainable matrix, as torch and bitsandbytes 0.50 make them.

    fp32 states take 4 bytes a weight, 8-bit ones 1 and 4 more for each block of 256 (arXiv 2110.02861
    §2); a matrix of fewer than 4,096 weights keeps fp32. Adafactor keeps a row and a column.
    """
    count = math.prod(shape)
    if optimizer == "adafactor":
        return 4 * (sum(shape) if len(shape) > 1 else count) + 4  # and one number: RMS
    num_states, small = STATES[optimizer]
    if small and count >= SMALL_STATE:
        return num_states * (count + 4 * -(-count // STATE_BLOCK))
    step = 4 if optimizer in ("adamw_torch", "adamw_torch_fused") else 0
    return num_states * 4 * count + step


def compute_dtype(run: Run, device: Device) -> torch.dtype:
    """The dtype of the matrix products of this run on this device, as ``choose_compute`` has it.

    Raises:
        PlanError: bf16 on a card that only emulates it.
    """
    precision = run.model.precision
    wanted = precision if precision in DTYPES else run.model.compute_dtype
    if device.kind == "cpu":
        return choose_compute(wanted, torch.device("cpu")).dtype  # type: ignore[arg-type]
    if wanted == "bf16" and not device.has_bf16:
        raise PlanError(
            f"{device.title} only emulates bf16 (compute capability 8.0 is needed); set"
            " model.compute_dtype to auto, fp32 or fp16, and model.precision to a quantised one"
        )
    if wanted != "auto":
        return DTYPES[wanted]
    # Without bf16 a quantised base trains in fp16 unless a probe of real rows finds that it cannot.
    return torch.bfloat16 if device.has_bf16 else torch.float16
