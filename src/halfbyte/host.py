"""Owns facts about this computer: its RAM and the limit on it, its CPU, disk and driver."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
USABLE_FRAC = (
    0.6  # share of the free memory that weights may take; the rest is for computing with them
)
GIB_BYTES = 1 << 30
CGROUP_ROOT = Path("/sys/fs/cgroup")
CPU_FLAGS = ("avx512_bf16", "amx_bf16", "avx512_vnni")  # make bf16 and int8 fast
DRIVER_TIMEOUT_S = 5


def ram_bytes() -> tuple[int, int]:
    """Return total and available RAM in bytes, both within the limit that a container or a job sets."""
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit()
    if limit is None or limit[0] >= memory.total:
        return memory.total, memory.available
    total, used = limit
    return total, max(0, min(memory.available, total - used))


def memory_limit() -> tuple[int, int] | None:
    """Return the memory limit of this process's control group and its use, in bytes, if it has one."""
    return attempt(lambda: cgroup_limit(CGROUP_ROOT, _read(Path("/proc/self/cgroup")) or ""))


def cgroup_limit(root: Path, membership: str) -> tuple[int, int] | None:
    """Return the tightest memory limit on a process and the memory used of it, in bytes.

    Args:
        root: The folder of the control groups, of version 1 or 2.
        membership: The text of ``/proc/<pid>/cgroup``. In a container its paths may not exist; then
            the root is the container's own group.
    """
    groups: list[Path] = []
    for line in membership.splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            base = root / "memory" if controllers else root
            group = base / path.strip("/")
            groups += [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
    limits = [limit for group in groups if (limit := _group_limit(group))]
    # Of equal limits the outer group's is reached first: other processes count towards it too.
    return min(limits, key=lambda limit: (limit[0], -limit[1]), default=None)


def _group_limit(group: Path) -> tuple[int, int] | None:
    """Return the limit and use of one group; use excludes the file cache, which is freed on demand."""
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _read(group / limit_file)
        if limit is None or not limit.isdigit():  # "max": no limit here
            continue
        stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
        used = int(_read(group / used_file) or 0) - int(stat.get(cache, 0))
        return int(limit), max(0, used)
    return None


def cpu_model() -> str | None:
    """Return the name that the CPU reports."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine() or None


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        result = attempt(
            lambda: subprocess.run(
                query, capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=True
            )
        )
        if result and result.stdout.strip():
            return result.stdout.splitlines()[0].strip()
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 ...
    words = (_read(Path("/proc/driver/nvidia/version")) or "").split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def host_facts() -> tuple[str, ...]:
    """Return a line for each fact that can be read about the CPU, the RAM and the disk."""
    lines = (attempt(fact) for fact in (_cpu, _vector_units, _cores, _ram, _limit, _disk))
    return tuple(line for line in lines if line)


def num_processes() -> int:
    """Return how many processes the launcher started to train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_cores() -> int:
    """Return how many CPU cores this process may use, or all, where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_main_process() -> bool:
    """Return whether this is the one of them that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def gib(num_bytes: int) -> str:
    """Format bytes, such as ``14.6 GiB``, or ``3.2 MiB`` where GiB would show little."""
    if num_bytes < GIB_BYTES:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIB_BYTES:.1f} GiB"


def attempt(read: Callable[[], T | None]) -> T | None:
    """Return what ``read`` returns, or None where it fails on this system."""
    try:
        return read()
    except Exception:  # systems fail in many ways, and no fact is worth a crash
        return None


def _cpu() -> str | None:
    model = cpu_model()
    return f"CPU: {model}" if model else None


def _vector_units() -> str:
    import torch

    flags = _cpuinfo().get("flags", "").split()
    return ", ".join(
        [
            f"vector units: {torch.backends.cpu.get_cpu_capability()}",
            *(flag for flag in CPU_FLAGS if flag in flags),
        ]
    )


def _cores() -> str:
    import psutil

    logical, physical = psutil.cpu_count(), psutil.cpu_count(logical=False)
    counts = [f"{physical} physical"] if physical else []
    counts += [f"{logical} logical"] if logical else []
    if hasattr(os, "sched_getaffinity"):
        counts.append(f"{len(os.sched_getaffinity(0))} for this process")
    return f"cores: {', '.join(counts)}"


def _ram() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"RAM: {gib(memory.total)}, {gib(memory.available)} available"


def _limit() -> str | None:
    import psutil

    limit = memory_limit()
    if limit is None or limit[0] >= psutil.virtual_memory().total:
        return None
    return f"memory limit of the control group: {gib(limit[0])}, {gib(limit[1])} in use"


def _disk() -> str:
    return f"disk: {gib(shutil.disk_usage(Path.cwd()).free)} free in the working directory"


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo, or none where there is no such file."""
    first = (_read(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; for the CPU, that of the machine."""
    if device.type == "cuda":
        from torch import cuda

        # Memory that torch has reserved but not allocated is available to its next tensor.
        unallocated = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        return int(cuda.mem_get_info(device)[0]) + unallocated
    return ram_bytes()[1]
