"""Owns the final choice of the compute dtype, which depends on real rows."""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.config.schema import Run
from halfbyte.data.samples import Samples
from halfbyte.forward.fp16_range import settle_half
from halfbyte.model.load import Loaded


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
