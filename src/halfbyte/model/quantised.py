"""Owns bitsandbytes' storage: its shapes and bytes, and the way back to plain weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.config.section import Precision

BLOCK = 64  # weights that share one maximum (QLoRA §3)
NESTED_BLOCK = 256  # maxima that share one of their own
NUM_CODES = {"nf4": 16, "fp4": 16}
NUM_NESTED_CODES = 256


@dataclass(frozen=True)
class Packing:
    """How bitsandbytes lays down a linear layer of (out, in) weights.

    4-bit: two weights a byte, a maximum for each 64 of them, in fp32 or, with double quantisation,
    in 8 bits with an fp32 maximum for each 256 and an offset (QLoRA §3: 32/64 = 0.5 bit a weight
    become 8/64 + 32/(64·256) = 0.127); and the tables of codes of each layer. int8: a byte a weight and
    an fp32 scale a row (LLM.int8, §2).
    """

    precision: Precision
    double_quant: bool = True

    def codes_bytes(self, num_weights: int) -> int:
        """Bytes of the packed weights, which transformers' footprint counts."""
        return num_weights if self.precision == "int8" else -(-num_weights // 2)

    def constants_bytes(self, num_weights: int, num_rows: int) -> int:
        """Bytes of the constants, which transformers' footprint leaves out."""
        if self.precision == "int8":
            return 4 * num_rows
        blocks, table = -(-num_weights // BLOCK), 4 * NUM_CODES[self.precision]
        if not self.double_quant:
            return 4 * blocks + table
        return blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + 4 * NUM_NESTED_CODES + table


def pack_shapes(layer: Any, packing: Packing, dtype: torch.dtype) -> None:
    """Give a bitsandbytes layer on the meta device the storage that packing its weight makes.

    The weight becomes a plain parameter: bitsandbytes' own class does not go with fake tensors.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if isinstance(layer, Linear8bitLt):
        shape = (layer.out_features, layer.in_features)
        packed: Any = nn.Parameter(empty(*shape, dtype=torch.int8), requires_grad=False)
        packed.CB = packed.SCB = None
        layer.weight = packed
        layer.state.CB, layer.state.SCB = packed.data, empty(shape[0])
        _unpack_for_peft(layer)
        return
    if not isinstance(layer, Linear4bit):
        return
    shape = (layer.out_features, layer.in_features)
    num_weights, table = shape[0] * shape[1], empty(NUM_CODES[packing.precision])
    blocks = -(-num_weights // BLOCK)
    inner, offset = None, None
    if packing.double_quant:
        inner = QuantState(
            absmax=empty(-(-blocks // NESTED_BLOCK)),
            code=empty(NUM_NESTED_CODES),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        offset = empty()
    state = QuantState(
        absmax=empty(blocks, dtype=torch.uint8 if packing.double_quant else torch.float32),
        shape=torch.Size(shape),
        code=table,
        blocksize=BLOCK,
        quant_type=packing.precision,
        dtype=dtype,
        offset=offset,
        state2=inner,
    )
    size = packing.codes_bytes(num_weights)
    packed = nn.Parameter(empty(size, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state, packed.bnb_quantized = state, True
    packed.quant_type, packed.compress_statistics = packing.precision, packing.double_quant
    packed.quant_storage = torch.uint8
    layer.weight, layer.quant_state = packed, state
    layer.support_avx512bf16_for_cpu = False  # as load_model sets it
    _unpack_for_peft(layer)


def _unpack_for_peft(layer: Any) -> None:
    """Let PEFT unpack the layer's weight, which DoRA adds to.

    PEFT goes by the class of the weight, and a plain one is taken as it is; a layer of HQQ, which it
    tells by ``W_q``, unpacks itself.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    def dequantize() -> Any:
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            return int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
        return dequantize_4bit(layer.weight.data, state)

    layer.W_q, layer.dequantize = layer.weight.data, dequantize


def constant_places(weight: Any) -> Iterator[tuple[Any, str]]:
    """Where a 4-bit weight keeps its constants: state and attribute, nested ones too."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if isinstance(getattr(state, name, None), torch.Tensor):
                yield state, name
        state = getattr(state, "state2", None)


def replace_tensors(module: Any, replace: Any) -> None:
    """Put ``replace(tensor)`` in the place of each constant that a packed layer holds, in place."""
    for state, name in constant_places(getattr(module, "weight", None)):
        setattr(state, name, replace(getattr(state, name)))
    int8_state: Any = getattr(module, "state", None)
    if getattr(int8_state, "SCB", None) is not None:
        int8_state.CB, int8_state.SCB = module.weight.data, replace(int8_state.SCB)


def plain_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a 4-bit or plain linear layer, unpacked to ``dtype``."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        stored: torch.Tensor = weight.detach().to(dtype)
        return stored
    from bitsandbytes.functional import dequantize_4bit

    # The state's dtype is the compute dtype, which may be another one.
    wanted = copy.copy(state)
    wanted.dtype = dtype
    unpacked: torch.Tensor = dequantize_4bit(weight.data, wanted)
    return unpacked.reshape(state.shape)


def dequantised_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight (out, in) in fp32: exactly what its stored codes and constants stand for."""
    codes, scales = int8_codes(layer)
    if codes is not None and scales is not None:
        plain: torch.Tensor = codes.float() * scales.float()[:, None] / 127.0
        return plain
    return plain_weight(layer, torch.float32)


def int8_codes(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """LLM.int8's codes (out, in) and scales (out,), which the first forward moves to the state."""
    weight: Any = getattr(layer, "weight", None)
    state: Any = getattr(layer, "state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(state, "SCB", None)
    if scales is None:
        return None, None
    codes = getattr(state, "CB", None)
    return (weight.data if codes is None else codes), scales


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a loaded model compute in ``dtype`` from now on, keeping the stored codes as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    module: Any
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.compute_dtype = dtype
            state.dtype = dtype


@torch.no_grad()
def unpack_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace 4-bit layers by plain ones with the very weights that they stand for, in ``dtype``."""
    layer: Any
    for name, layer in list(model.named_modules()):
        # PEFT's layers show the weight of the layer in them as their own.
        is_wrapper = hasattr(layer, "base_layer")
        if is_wrapper or getattr(getattr(layer, "weight", None), "quant_state", None) is None:
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(plain_weight(layer, dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
