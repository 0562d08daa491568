"""Owns the true size of a loaded model: every byte of weights, quantisation constants included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.model.quantised import constant_attributes, int8_codes


@dataclass(frozen=True)
class ParameterGroup:
    """Counts the parameters of one kind that are stored in one way, and their bytes."""

    name: str
    stored_as: str
    num_parameters: int
    num_bytes: int


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and quantisation constants; shared storage counts once."""
    return sum(tensor.nbytes for tensor in stored_tensors(model))


def constants_bytes(model: nn.Module) -> int:
    """Return the bytes of the quantisation constants alone, which transformers' footprint omits."""
    four_bit = sum(tensor.nbytes for p in model.parameters() for tensor in _constants(p))
    return four_bit + sum(scale.nbytes for m in model.modules() for scale in _int8_scales(m))


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Group the parameters by kind and storage, the largest first; tied weights count once."""
    sizes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = sizes[_kind(module_name, module, name), _stored_as(parameter)]
            size[0] += _count(parameter)
            size[1] += parameter.nbytes + sum(t.nbytes for t in _constants(parameter))
            if name == "weight":
                size[1] += sum(t.nbytes for t in _int8_scales(module))
    groups = [ParameterGroup(*key, *size) for key, size in sizes.items()]
    return sorted(groups, key=lambda group: -group.num_bytes)


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights; a packed 4-bit byte holds two."""
    return sum(_count(p) for p in model.parameters())


def stored_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, quantisation constants and buffers, each storage once; meta tensors too."""
    seen: set[int] = set()
    for tensor in _tensors(model):
        # Compare the storages themselves: the data pointer is 0 for every tensor without data.
        storage = tensor.untyped_storage()._cdata
        if storage not in seen:
            seen.add(storage)
            yield tensor


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter.data
        yield from _constants(parameter)
    for module in model.modules():
        yield from _int8_scales(module)
    yield from model.buffers()


def _constants(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    return (getattr(state, name) for state, name in constant_attributes(parameter))


def _int8_scales(module: nn.Module) -> Iterator[torch.Tensor]:
    _, scales = int8_codes(module)
    if scales is not None:
        yield scales


def _count(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _stored_as(parameter: torch.Tensor) -> str:
    quant_type = getattr(parameter, "quant_type", None)
    if quant_type is not None:
        return f"{quant_type} in {str(parameter.dtype).removeprefix('torch.')}"
    return str(parameter.dtype).removeprefix("torch.")


def _kind(module_name: str, module: nn.Module, name: str) -> str:
    if "lora_" in module_name:
        return "LoRA adapter"
    if any(word in module_name for word in ("vision", "multi_modal")):
        return "vision"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module_name.endswith("lm_head"):
        return "language-model head"
    if name == "bias":
        return "bias"
    return "linear" if isinstance(module, nn.Linear) else "norm and other"
