"""Owns the final choice of the compute dtype, which depends on real rows, and the scale of losses in fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.config.schema import Run
from halfbyte.data.samples import Samples
from halfbyte.forward.fp16_range import settle_half
from halfbyte.model.load import Loaded

# From torch's 65,536 the first three steps of Gemma-3-270M overflow, and are lost.
INITIAL_SCALE = 4096.0


def settle_compute(run: Run, loaded: Loaded, model: nn.Module, samples: Samples) -> Run:
    """Probe fp16 where ``auto`` chose it; return the run, set to fp32 if fp16 cannot hold the values.

    In that case ``loaded.compute`` is also changed to fp32, with the reason.
    """
    if loaded.compute.dtype != torch.float16 or run.model.compute_dtype != "auto":
        return run
    settle_half(loaded, model, samples.tokens)
    if loaded.compute.dtype == torch.float16:
        return run
    settled = run.model.model_copy(update={"compute_dtype": "fp32"})
    return run.model_copy(update={"model": settled})


def scale_losses(accelerator: Any) -> None:
    """Let an accelerator scale losses, so that gradients in fp16 do not vanish; on a CPU it casts to fp16 too.

    accelerate does both on accelerators alone (1.15).
    """
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=INITIAL_SCALE)
