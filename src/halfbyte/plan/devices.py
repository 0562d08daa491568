"""Owns what is known about devices: a table of cards, and the facts of this machine."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from halfbyte.errors import PlanError
from halfbyte.host import (
    GIB_BYTES,
    attempt,
    cpu_model,
    driver_version,
    gib,
    host_facts,
    ram_bytes,
)
from halfbyte.kernels.capability import capability_of
from halfbyte.model.precision import FIRST_BF16_CAPABILITY, default_device

MIB_BYTES = 1 << 20
PROCESS_BYTES = 1_100_000_000  # resident size of halfbyte train before the weights are loaded

# What a process takes on a card besides PyTorch's tensors: the context and the loaded kernels. The
# values are at or just above the larger readings of "in use" minus "allocated" minus "reserved but
# unallocated" in out-of-memory messages. A card takes the value of the last listed generation up to its own.
CONTEXT_MIB = {
    (6, 0): 350,
    (7, 0): 400,
    (7, 5): 250,
    (8, 0): 550,  # larger chips take more: an A100 takes more than a 3090
    (8, 6): 350,
    (8, 9): 500,
    (9, 0): 700,  # also for the MI300X (9.4), of which no reading is known
    (12, 0): 650,
}
# cuBLAS takes a workspace per handle, and each thread has a handle: the forward pass runs in one thread,
# the backward pass in another. Blackwell has had Hopper's size only since pytorch/pytorch#175344.
CUBLAS_HANDLES = 2
CUBLAS_BYTES = {(0, 0): 8_519_680, (9, 0): 32 * MIB_BYTES}
ROCM_GFX942, ROCM_GFX942_BYTES = (9, 4), 128 * MIB_BYTES

MAKERS = r"nvidia|geforce|tesla|amd|instinct"
ASSUMED = "assumed: an Ampere card of compute capability 8.0 that reports all of this memory"


@dataclass(frozen=True)
class Device:
    """Describes a device by its memory in all and what is taken before the first tensor."""

    name: str
    title: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int  # as PyTorch reports it; for the CPU the RAM, or the control group's limit
    context_bytes: int  # what the process takes besides tensors
    workspace_bytes: int  # cuBLAS
    capability: tuple[int, int] | None  # that passes are computed for
    in_use_bytes: int = 0  # by other processes at this moment; known only for this machine
    facts: tuple[str, ...] = ()  # lines to print about this machine

    @property
    def usable_bytes(self) -> int:
        """Bytes left for tensors; below zero where not even the process fits."""
        return self.total_bytes - self.in_use_bytes - self.context_bytes

    @property
    def has_bf16(self) -> bool:
        """Whether a CUDA device computes in bf16 without emulation."""
        return self.capability is not None and self.capability >= FIRST_BF16_CAPABILITY

    @property
    def has_flash(self) -> bool:
        """Whether flash attention has kernels for this device."""
        return self.has_bf16  # both came with Ampere


@dataclass(frozen=True)
class Card:
    """Describes a row of the table; ``source`` says where ``total_gib`` was read."""

    name: str
    title: str
    capability: tuple[int, int]
    sold_gib: int
    total_gib: float
    source: str


# ``total_gib`` is the smallest total read under Linux: it shrinks with newer drivers, and ECC takes part of
# the memory of a T4, L4, A10G, A6000 and L40S. Windows reports nearly the size sold, but less is usable.
CARDS = (
    Card("gtx1080ti", "GeForce GTX 1080 Ti", (6, 1), 11, 10.91, "Ultralytics banner"),
    Card("p100", "Tesla P100-PCIE-16GB", (6, 0), 16, 15.88, "Ultralytics banner"),
    Card("v100", "Tesla V100-SXM2-16GB", (7, 0), 16, 15.75, "YOLOv5 banner"),
    Card("v100-32gb", "Tesla V100-SXM2-32GB", (7, 0), 32, 31.73, "Ultralytics banner"),
    Card("t4", "Tesla T4", (7, 5), 16, 14.56, "Zheng-Chong/CatVTON#133"),
    Card("rtx2060", "GeForce RTX 2060 6GB", (7, 5), 6, 5.59, "a program's report"),
    Card("a100-40gb", "NVIDIA A100 40GB", (8, 0), 40, 39.38, "OOM message"),
    # The message's script is for this card; messages that name it begin at 79.14.
    Card("a100-80gb", "NVIDIA A100 80GB", (8, 0), 80, 79.11, "OOM message"),
    Card("rtx3050-6gb", "GeForce RTX 3050 6GB Laptop", (8, 6), 6, 5.66, "Ultralytics banner"),
    Card("rtx3050-8gb", "GeForce RTX 3050 8GB", (8, 6), 8, 7.6, "a user's note, one decimal"),
    Card("rtx3060", "GeForce RTX 3060 12GB", (8, 6), 12, 11.62, "OOM message"),
    Card("rtx3060ti", "GeForce RTX 3060 Ti 8GB", (8, 6), 8, 7.64, "Ultralytics banner"),
    Card("rtx3090", "GeForce RTX 3090", (8, 6), 24, 23.55, "Ultralytics banner"),
    Card("a10g", "NVIDIA A10G", (8, 6), 24, 21.98, "Unsloth banner"),
    Card("a6000", "NVIDIA RTX A6000 48GB", (8, 6), 48, 44.42, "Unsloth banner"),
    Card("rtx4060", "GeForce RTX 4060 8GB", (8, 9), 8, 7.62, "Ultralytics banner"),
    Card("rtx4060ti-8gb", "GeForce RTX 4060 Ti 8GB", (8, 9), 8, 7.62, "Ultralytics banner"),
    Card("rtx4060ti-16gb", "GeForce RTX 4060 Ti 16GB", (8, 9), 16, 15.57, "Unsloth banner"),
    Card("rtx4070", "GeForce RTX 4070 12GB", (8, 9), 12, 11.56, "OOM report"),
    Card("rtx4080", "GeForce RTX 4080 16GB", (8, 9), 16, 15.57, "a program's report"),
    Card("rtx4090", "GeForce RTX 4090", (8, 9), 24, 23.49, "OOM message"),
    Card("l4", "NVIDIA L4", (8, 9), 24, 21.95, "a user's note"),
    Card("l40s", "NVIDIA L40S", (8, 9), 48, 44.39, "Unsloth banner"),
    Card("h100", "NVIDIA H100 80GB", (9, 0), 80, 79.1, "OOM message"),
    Card("h200", "NVIDIA H200 141GB", (9, 0), 141, 139.7, "Unsloth banner"),
    Card("mi300x", "AMD Instinct MI300X", ROCM_GFX942, 192, 191.68, "Unsloth banner"),
    Card("rtx5090", "GeForce RTX 5090", (12, 0), 32, 31.33, "a program's constant"),
)


def context_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes that a process takes on such a card besides tensors and workspaces."""
    return MIB_BYTES * CONTEXT_MIB[max((c for c in CONTEXT_MIB if c <= capability), default=(6, 0))]


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of cuBLAS workspaces for the forward and the backward thread."""
    if capability == ROCM_GFX942:
        return CUBLAS_HANDLES * ROCM_GFX942_BYTES
    return CUBLAS_HANDLES * CUBLAS_BYTES[max(c for c in CUBLAS_BYTES if c <= capability)]


def _card(name: str, title: str, capability: tuple[int, int], total_gib: float) -> Device:
    return Device(
        name=name,
        title=title,
        kind="cuda",
        total_bytes=round(total_gib * GIB_BYTES),
        context_bytes=context_bytes(capability),
        workspace_bytes=workspace_bytes(capability),
        capability=capability,
    )


DEVICES = {c.name: _card(c.name, c.title, c.capability, c.total_gib) for c in CARDS}


def find_device(name: str) -> Device:
    """Find the device with this name.

    Args:
        name: A key of ``DEVICES`` in any spacing and capitalisation, with or without maker and size;
            ``auto`` for this machine; ``cpu`` for its RAM; ``cpu-16`` for a machine with 16 GiB of
            RAM; ``24gb`` for any card with 24 GiB.

    Raises:
        PlanError: no device has that name, or more than one card has.
    """
    plain = _normalised(name)
    if plain == "auto":
        return this_machine()
    if plain == "cpu":
        return _this_cpu()
    sized = re.fullmatch(r"(cpu|ram)?(\d{1,5}(?:\.\d+)?)(g|gb|gib)?", plain)
    if sized and (sized[1] or sized[3]) and float(sized[2]) > 0:
        size = f"{float(sized[2]):g}"
        if not sized[1]:
            card = _card(f"{size}gb", f"a card with {size} GiB", (8, 0), float(size))
            return replace(card, facts=(ASSUMED,))
        total = round(float(size) * GIB_BYTES)
        title = f"a machine with {size} GiB of RAM"
        return Device(f"cpu-{size}gb", title, "cpu", total, PROCESS_BYTES, 0, None)
    matches = _matching_keys(plain)
    if len(matches) == 1:
        return DEVICES[matches[0]]
    if matches:
        raise PlanError(f"device {name!r} is ambiguous: use {' or '.join(matches)}")
    spellings = [spelling for card in CARDS for spelling in _spellings(card)]
    near = difflib.get_close_matches(plain, spellings, n=1, cutoff=0.7)
    hint = f"the nearest is {' or '.join(_matching_keys(near[0]))}; " if near else ""
    raise PlanError(
        f"device {name!r} is unknown; {hint}allowed are auto (this machine), cpu (its RAM), cpu-16gb"
        f" (any RAM), 24gb (any card), {', '.join(sorted(DEVICES))}"
    )


def _normalised(name: str) -> str:
    return re.sub(rf"[\s_-]|{MAKERS}", "", name.lower())


def _spellings(card: Card) -> set[str]:
    """Return every spelling of a card: ``v100``, ``v10016gb``, ``v100sxm2``; ``rtx4090``, ``4090``."""
    stem, title, size = card.name.split("-")[0], _normalised(card.title), f"{card.sold_gib}gb"
    full = {_normalised(card.name), stem, stem + size, title, title.removesuffix(size)}
    return full | {re.sub("^[rg]tx", "", spelling) for spelling in full}


def _matching_keys(plain: str) -> list[str]:
    exact = [card.name for card in CARDS if _normalised(card.name) == plain]
    return exact or [card.name for card in CARDS if plain in _spellings(card)]


def this_machine() -> Device:
    """Return this process's CUDA device if it has one, else the CPU with its RAM."""
    device = default_device()
    return _this_card(device.index) if device.type == "cuda" else _this_cpu()


def _this_card(index: int) -> Device:
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    total, in_use = properties.total_memory, 0
    facts = [
        f"GPU {index} of {count}: {properties.name},"
        f" compute capability {properties.major}.{properties.minor}"
    ]
    try:
        free, _ = torch.cuda.mem_get_info(index)
        # This process's context is in use by now; an idle card has nothing else on it.
        our_bytes = torch.cuda.memory_reserved(index) + context_bytes(capability)
        in_use = max(0, total - free - our_bytes)
        facts.append(f"GPU memory: {gib(total)}, {gib(in_use)} in use by other processes")
    except RuntimeError:  # the card is so full that no context fits
        facts.append(f"GPU memory: {gib(total)}; the part in use could not be read")
    driver = attempt(driver_version)
    keys = _matching_keys(_normalised(properties.name))
    return Device(
        name=keys[0] if len(keys) == 1 else re.sub(r"[^a-z0-9]+", "-", properties.name.lower()),
        title=properties.name,
        kind="cuda",
        total_bytes=total,
        context_bytes=context_bytes(capability),
        workspace_bytes=workspace_bytes(capability),
        capability=capability_of(torch.device("cuda", index)),
        in_use_bytes=in_use,
        facts=(*facts, *([f"driver: {driver}"] if driver else []), *host_facts()),
    )


def _this_cpu() -> Device:
    import psutil

    total, available = ram_bytes()
    memory = psutil.Process().memory_info()
    # Libraries mapped from files (shared) already count as available.
    private_bytes = memory.rss - getattr(memory, "shared", 0)
    return Device(
        name="cpu",
        title=attempt(cpu_model) or "CPU",
        kind="cpu",
        total_bytes=total,
        context_bytes=PROCESS_BYTES,
        workspace_bytes=0,
        capability=capability_of(torch.device("cpu")),
        in_use_bytes=max(0, total - available - private_bytes),
        facts=host_facts(),
    )


def as_markdown() -> str:
    """Return the table of cards for the docs."""
    lines = [
        "| name | card | GiB | compute capability | beside tensors, MiB | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for card in CARDS:
        device = DEVICES[card.name]
        major, minor = card.capability
        lines.append(
            f"| {card.name} | {card.title} | {card.total_gib} | {major}.{minor} |"
            f" {device.context_bytes // MIB_BYTES} | {card.source} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
