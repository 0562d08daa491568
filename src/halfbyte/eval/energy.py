"""Owns measuring the power that a computation draws where the hardware counts it; nothing is guessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")  # Linux's energy counters of CPU packages, in microjoules


class Meter:
    """Measures the mean power from the moment it is created.

    It reads the counter of the GPU (NVML), or on a CPU those of its packages (RAPL), which count everything
    that runs on them. Where neither can be read, the config's ``watts`` are taken, if given.

    Args:
        device: the device that computes.
        watts: ``eval.watts`` of the config.
    """

    def __init__(self, device: torch.device, watts: float | None) -> None:
        self._watts = watts
        self._counters = _nvml(device) if device.type == "cuda" else _rapl(RAPL)
        self._start, self._start_joules = time.perf_counter(), self._read()

    def watts(self) -> float | None:
        """Return the mean power until now, or None where it is unknown."""
        joules = [now - start for now, start in zip(self._read(), self._start_joules, strict=True)]
        # After a counter has wrapped around, its difference means nothing.
        if not joules or min(joules) <= 0:
            return self._watts
        return sum(joules) / (time.perf_counter() - self._start)

    def _read(self) -> list[float]:
        """Return the joules of each counter."""
        return [] if self._counters is None else self._counters()


def _rapl(root: Path) -> Callable[[], list[float]] | None:
    """Return a reader of all packages' counters; the other counters there are parts of these."""
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
    """Return a reader of the GPU's energy counter, or None where it has none that can be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES numbers devices differently from NVML.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, or a card older than Volta: NVML raises errors of many kinds
        return None
    return lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3]
