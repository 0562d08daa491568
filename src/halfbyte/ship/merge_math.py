"""Owns the arithmetic of the merge: W + s·BA, or DoRA's normalised form, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from halfbyte.errors import RunError
from halfbyte.model.quantised import dequantised_weight

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"
PREFIX = "base_model.model."


ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class NewRows:
    """The trained rows (K, E) of new tokens in an embedding or a head, and their ids."""

    rows: torch.Tensor
    ids: list[int]

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight (V, E)."""
        ids = torch.tensor(self.ids, device=weight.device)
        return weight.index_copy(0, ids, self.rows.to(weight))


@dataclass(frozen=True)
class Update:
    """A layer's LoRA matrices in fp32: ``a`` (r, in), ``b`` (out, r), DoRA's magnitude (out,) or None."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged fp32 weight (out, in).

        LoRA: W + s·BA (arXiv 2106.09685 §4.1). DoRA: m·(W + s·BA)/‖W + s·BA‖, the norm over each
        row of (out, in) (arXiv 2402.09353 eq. 5).
        """
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        merged: torch.Tensor = torch.addmm(weight, b, a, alpha=self.scale)
        if self.magnitude is None:
            return merged
        norms = torch.linalg.vector_norm(merged, dim=1)
        scaled: torch.Tensor = merged * (self.magnitude.to(weight.device) / norms)[:, None]
        return scaled


def read_updates(adapter: Path) -> dict[str, Update | NewRows]:
    """Return a saved adapter's updates by layer name, such as ``model.layers.0.self_attn.q_proj``.

    Raises:
        RunError: the adapter contains something that the merge formula does not cover.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    odd = [key for key in ("alpha_pattern", "rank_pattern", "modules_to_save") if config.get(key)]
    if odd or config.get("bias", "none") != "none":
        raise RunError(
            f"{adapter}: has {', '.join(odd) or 'trained biases'}, which halfbyte does not merge"
        )
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    scale = config["lora_alpha"] / divisor
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        tensors = {
            name.removeprefix(PREFIX): file.get_tensor(name).float()
            for name in file.keys()  # noqa: SIM118 - safe_open is not a mapping
        }
    updates: dict[str, Update | NewRows] = {}
    for name, ids in (config.get("trainable_token_indices") or {}).items():
        updates[name] = NewRows(tensors.pop(f"{name}{ROWS}"), ids)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        updates[layer] = Update(
            tensors.pop(name),
            tensors.pop(f"{layer}.lora_B.weight"),
            scale,
            tensors.pop(f"{layer}.lora_magnitude_vector", None),
        )
    if tensors or not any(isinstance(update, Update) for update in updates.values()):
        raise RunError(f"{adapter}: tensors without a place in the merge: {sorted(tensors)[:3]}")
    return updates


def merged_tensors(
    model: nn.Module, updates: dict[str, Update | NewRows], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the merged checkpoint one by one, folded in fp32 and stored in ``dtype``.

    ``model`` is a plain or quantised causal model, with or without PEFT's wrappers around its layers;
    quantised layers are dequantised one by one. Tied weights are yielded once.

    Raises:
        RunError: an update matches no layer, or a value is not finite or overflows ``dtype``.
    """
    folded: set[str] = set()
    modules = dict(model.named_modules())
    for full_name, parameter in model.named_parameters():
        if "lora_" in full_name or "trainable_tokens_delta" in full_name:
            continue
        owner, _, leaf = full_name.rpartition(".")
        layer = owner.removesuffix(".base_layer").removesuffix(".token_adapter")
        tensor = parameter.detach()
        if leaf == "weight" and isinstance(modules[owner], nn.Linear):
            tensor = dequantised_weight(modules[owner])
        if leaf == "weight" and layer in updates:
            tensor = updates[layer].fold(tensor)
            folded.add(layer)
        stored = tensor.to(dtype)
        if not torch.isfinite(stored).all():
            raise RunError(
                f"{layer}.{leaf}: NaN or infinity after merging to {dtype}; try merge.dtype=fp32"
            )
        yield f"{layer}.{leaf}", stored.cpu().contiguous()
    lost = sorted(set(updates) - folded)
    if lost:
        raise RunError(f"merge: {len(lost)} adapted layers are not in the base: {lost[:3]}")


def write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Write tensors as safetensors with one shard in memory at a time; return their total bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    total = held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            _write_shard(folder, shard, shards)
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    _write_shard(folder, shard, shards)
    _name_shards(folder, shards, total)
    return total


def _write_shard(folder: Path, shard: dict[str, torch.Tensor], shards: list[list[str]]) -> None:
    shards.append(list(shard))
    save_file(shard, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Rename the shards as transformers expects, once their number is known."""
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
