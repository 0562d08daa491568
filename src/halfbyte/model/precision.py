"""Owns which dtype computes where: by compute capability on CUDA, by measurement on CPU."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from halfbyte.config.schema import Model
from halfbyte.config.section import ComputeDtype
from halfbyte.errors import ModelError
from halfbyte.host import cpu_model
from halfbyte.kernels.capability import AMPERE, capability_of

PlainPrecision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
NAMES: dict[torch.dtype, PlainPrecision] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
FIRST_BF16_CAPABILITY = AMPERE  # a T4 is 7.5 and only emulates bf16
GEMM_TOKENS, GEMM_IN, GEMM_OUT = 256, 576, 1536  # an MLP layer of a 135M model
GEMM_REPEATS = 3


@dataclass(frozen=True)
class Compute:
    """Holds a device, the dtype of its matrix products, and the reason for that dtype."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> PlainPrecision:
        """Return ``fp32``, ``bf16`` or ``fp16``."""
        return NAMES[self.dtype]


def choose_compute(compute_dtype: ComputeDtype, device: torch.device | None = None) -> Compute:
    """Resolve ``model.compute_dtype`` for a device, by default this process's own.

    ``auto`` never asks ``torch.cuda.is_bf16_supported()``, which counts emulation as support.

    Raises:
        ModelError: bf16 is set for a CUDA device that only emulates it.
    """
    device = device or default_device()
    capability = capability_of(device)
    if capability is not None:
        native = capability >= FIRST_BF16_CAPABILITY
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        card = f"{name}, compute capability {capability[0]}.{capability[1]}"
        if compute_dtype == "bf16" and not native:
            raise ModelError(
                f"model.compute_dtype is bf16, but {card} only emulates it (8.0 is needed); use auto,"
                " fp32 or fp16"
            )
        if compute_dtype != "auto":
            return Compute(device, DTYPES[compute_dtype], "as configured")
        if native:
            return Compute(device, torch.bfloat16, f"{card} has bf16")
        return Compute(device, torch.float32, f"{card} has no bf16, and fp16 may overflow")
    if compute_dtype != "auto":
        return Compute(device, DTYPES[compute_dtype], "as configured")
    fp32_s, bf16_s = gemm_seconds(torch.float32), gemm_seconds(torch.bfloat16)
    ratio = bf16_s / fp32_s
    chosen = torch.bfloat16 if ratio < 1 else torch.float32
    return Compute(
        device, chosen, f"a measured step in bf16 takes {ratio:.1f}x the time of one in fp32 here"
    )


def keep_residual_in_fp32(model: Any) -> None:
    """Keep the residual stream in fp32, in place: the embedding's output and all that is added to it.

    Linear layers cast their input to the dtype of their products under autocast, and bitsandbytes'
    layers always do; a hook casts the head's.
    """

    def widen(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.float()

    def narrow(head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].to(head.weight.dtype), *inputs[1:])

    model.get_input_embeddings().register_forward_hook(widen)
    model.get_output_embeddings().register_forward_pre_hook(narrow)


def may_train_in_half(settings: Model, device: torch.device) -> bool:
    """Return whether ``auto`` may become fp16 for training: a 4- or 8-bit base on CUDA without bf16."""
    capability = capability_of(device)
    if capability is None or settings.compute_dtype != "auto" or settings.precision in DTYPES:
        return False
    return capability < FIRST_BF16_CAPABILITY


def device_name(device: torch.device | None = None) -> str:
    """Name the card, or the processor with its vector units and its number of compute threads."""
    device = device or default_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    units = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_model()}, {units}, {torch.get_num_threads()} threads"


def default_device() -> torch.device:
    """Return this process's CUDA device where there is one, else the CPU."""
    import os

    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in (
        "true",
        "1",
    ):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@functools.cache  # measured once: the plan and the load must agree
def gemm_seconds(dtype: torch.dtype) -> float:
    """Measure one linear layer's forward and input gradient on the CPU in seconds; the best of three."""
    x = torch.randn(GEMM_TOKENS, GEMM_IN).to(dtype)
    weight = torch.randn(GEMM_OUT, GEMM_IN).to(dtype)
    gradient = torch.randn(GEMM_TOKENS, GEMM_OUT).to(dtype)
    times = []
    for _ in range(GEMM_REPEATS + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        gradient @ weight
        times.append(time.perf_counter() - start)
    return min(times[1:])
