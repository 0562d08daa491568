"""Owns the power that a measurement drew, where the hardware counts it; nothing is guessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")  # Linux's counters of a CPU's packages, in microjoules


class Meter:
    """Mean power from its making on.

    On a GPU its own counter (NVML), else those of the CPU's packages (RAPL), which count everything that
    runs on them; where neither can be read, ``watts`` of the config stand for them, or nothing does.

    Args:
        device: that computes.
        watts: of ``eval.watts``.
    """

    def __init__(self, device: torch.device, watts: float | None) -> None:
        self._watts = watts
        self._joules = _nvml(device) if device.type == "cuda" else _rapl(RAPL)
        self._start, self._from = time.perf_counter(), self._read()

    def watts(self) -> float | None:
        """Mean power until now."""
        gained = [now - before for now, before in zip(self._read(), self._from, strict=True)]
        # A counter that wrapped around has counted nothing of use.
        if not gained or min(gained) <= 0:
            return self._watts
        return sum(gained) / (time.perf_counter() - self._start)

    def _read(self) -> list[float]:
        """Joules of each counter."""
        return [] if self._joules is None else self._joules()


def _rapl(root: Path) -> Callable[[], list[float]] | None:
    """Counters of all packages; what else is counted there lies within them."""
    counters = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                (zone / "energy_uj").read_text()
                counters.append(zone / "energy_uj")
    except OSError:  # only root may read them on many systems
        return None
    if not counters:
        return None
    return lambda: [int(path.read_text()) / 1e6 for path in counters]


def _nvml(device: torch.device) -> Callable[[], list[float]] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its identity: CUDA_VISIBLE_DEVICES gives other numbers than NVML does.
        identity = torch.cuda.get_device_properties(device).uuid
        found = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(found)
    except Exception:  # not installed, or a card from before Volta: its own errors are many
        return None
    return lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(found) / 1e3]
