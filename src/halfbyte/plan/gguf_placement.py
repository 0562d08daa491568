"""Owns where llama.cpp places the parts of a GGUF file, in VRAM or in RAM, from the file's header alone.

Source, read as facts: llama.cpp b10437 and b11739, src/llama-model.cpp (``load_tensors``: with
``gpu_layers`` k the output comes first and then the last k − 1 layers, so that a file of n layers is
wholly in VRAM at k = n + 1; input embeddings stay in RAM, and a head tied to them is stored a second
time), src/llama-context.cpp (``swa_full`` is on by default: layers with a sliding window cache every
token too; llama.cpp's server turns it off and takes less). Sizes are those that llama.cpp prints when it
loads a file (tests/test_gguf_placement.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError
from halfbyte.llamacpp.gguf_file import GgufFile, read_gguf
from halfbyte.plan.report import CONTEXTS

if TYPE_CHECKING:
    from halfbyte.plan.devices import Device


@dataclass(frozen=True)
class Split:
    """Describes one way to place a file.

    Attributes:
        context: tokens of the prompt and the answer.
        gpu_layers: layers in VRAM as llama.cpp counts them: the output is one.
        vram_bytes: weights, KV cache and temporaries in VRAM, without those of the process itself.
        ram_bytes: the same in RAM.
    """

    context: int
    gpu_layers: int
    vram_bytes: int
    ram_bytes: int


def room_bytes(device: Device) -> int:
    """Return the bytes for weights, KV cache and temporaries: VRAM of a card, RAM of a CPU."""
    return device.usable_bytes - device.workspace_bytes


def splits(file: GgufFile, device: Device, gpu_layers: int | None = None) -> list[Split]:
    """Place a file for each context, with as many layers in VRAM as fit.

    ``gpu_layers`` places that many instead (-1: all). On a CPU there are none.
    """
    all_layers = len(file.layer_bytes) + 1
    placements = []
    contexts = [context for context in CONTEXTS if context <= file.context_length]
    for context in contexts or [file.context_length]:
        if device.kind == "cpu":
            count = 0
        elif gpu_layers is not None:
            count = all_layers if gpu_layers < 0 else min(gpu_layers, all_layers)
        else:
            candidates = (_place(file, context, count) for count in range(all_layers, 0, -1))
            room = room_bytes(device)
            count = next((split.gpu_layers for split in candidates if split.vram_bytes <= room), 0)
        placements.append(_place(file, context, count))
    return placements


def plan(path: Path, device: Device, gpu_layers: int | None = None) -> dict[str, Any]:
    """Return where the parts of a file are placed on a device, as plain values; every size is in bytes.

    Raises:
        PlanError: as ``read_gguf``, or layers are requested in the VRAM of a CPU.
    """
    if gpu_layers and device.kind == "cpu":
        raise PlanError(
            f"--gpu-layers {gpu_layers}: {device.title} has no VRAM; name a card: --device t4"
        )
    file = read_gguf(path)
    room = room_bytes(device)
    return {
        "architecture": file.architecture,
        "device": device.name,
        "room_bytes": room,
        "num_layers": len(file.layer_bytes),
        "largest_layer_bytes": max(file.layer_bytes),
        "output_bytes": file.output_bytes + file.tied_bytes,
        "splits": [
            asdict(split)
            | {"fits": (split.ram_bytes if device.kind == "cpu" else split.vram_bytes) <= room}
            for split in splits(file, device, gpu_layers)
        ],
    }


def as_text(report: dict[str, Any]) -> str:
    """Format the result of ``plan`` as a table for a terminal."""
    all_layers = report["num_layers"] + 1
    lines = [
        f"TO RUN THE FILE IN LLAMA.CPP on {report['device']}, GB ({report['architecture']},"
        f" {report['num_layers']} layers of at most {report['largest_layer_bytes'] / 1e9:.3f},"
        f" output {report['output_bytes'] / 1e9:.3f})",
        f"  {'context':>10}{'gpu_layers':>14}{'in VRAM':>12}{'in RAM':>12}",
    ]
    for split in report["splits"]:
        layers = f"{split['gpu_layers']} of {all_layers}"
        lines.append(
            f"  {split['context']:>10,}{layers:>14}{split['vram_bytes'] / 1e9:>12.3f}"
            f"{split['ram_bytes'] / 1e9:>12.3f}" + ("" if split["fits"] else "  does not fit")
        )
    lines.append(
        f"  {report['room_bytes'] / 1e9:.3f} GB are available; the output counts as a layer"
    )
    return "\n".join(lines)


def _place(file: GgufFile, context: int, gpu_layers: int) -> Split:
    layers = [
        weights + cache
        for weights, cache in zip(file.layer_bytes, file.cache_bytes(context), strict=True)
    ]
    first = max(0, len(layers) + 1 - gpu_layers)  # the first layer in VRAM
    ram = file.input_bytes + sum(layers[:first])
    vram = sum(layers[first:])
    if gpu_layers:
        vram += file.output_bytes + file.tied_bytes + file.work_bytes
    else:
        ram += file.output_bytes
    if first:
        ram += file.work_bytes
    return Split(context, gpu_layers, vram, ram)
