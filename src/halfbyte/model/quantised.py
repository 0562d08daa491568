"""Owns bitsandbytes' storage: its shapes and bytes, and unpacking it to plain weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.config.section import Precision
from halfbyte.kernels.operators import launched
from halfbyte.kernels.unpack import NESTED_BLOCK

BLOCK = 64  # weights that share one maximum (QLoRA §3)
NUM_CODES = {"nf4": 16, "fp4": 16}
NUM_NESTED_CODES = 256
INT8_CODES = 127.0  # the largest code of LLM.int8


@dataclass(frozen=True)
class Packing:
    """Describes how bitsandbytes stores a linear layer of (out, in) weights.

    4-bit: two weights per byte and one maximum per 64 weights, in fp32 or, with double quantisation, in
    8 bits with an fp32 maximum per 256 of them and an offset (QLoRA §3: 32/64 = 0.5 bit per weight
    become 8/64 + 32/(64·256) = 0.127); and the code tables of each layer. int8: one byte per weight and
    an fp32 scale per row (LLM.int8, §2).
    """

    precision: Precision
    double_quant: bool = True

    def codes_bytes(self, num_weights: int) -> int:
        """Return the bytes of the packed weights, which transformers' footprint counts."""
        return num_weights if self.precision == "int8" else -(-num_weights // 2)

    def constants_bytes(self, num_weights: int, num_rows: int) -> int:
        """Return the bytes of the constants, which transformers' footprint omits."""
        if self.precision == "int8":
            return 4 * num_rows
        num_blocks, table_bytes = -(-num_weights // BLOCK), 4 * NUM_CODES[self.precision]
        if not self.double_quant:
            return 4 * num_blocks + table_bytes
        nested_bytes = 4 * -(-num_blocks // NESTED_BLOCK) + 4 + 4 * NUM_NESTED_CODES
        return num_blocks + nested_bytes + table_bytes


def pack_shapes(layer: Any, packing: Packing, dtype: torch.dtype) -> None:
    """Give a bitsandbytes layer on the meta device the storage that packing its weight would create.

    The weight becomes a plain parameter: bitsandbytes' own class does not work with fake tensors.
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
    num_weights, code_table = shape[0] * shape[1], empty(NUM_CODES[packing.precision])
    num_blocks = -(-num_weights // BLOCK)
    nested_state, offset = None, None
    if packing.double_quant:
        nested_state = QuantState(
            absmax=empty(-(-num_blocks // NESTED_BLOCK)),
            code=empty(NUM_NESTED_CODES),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        offset = empty()
    state = QuantState(
        absmax=empty(num_blocks, dtype=torch.uint8 if packing.double_quant else torch.float32),
        shape=torch.Size(shape),
        code=code_table,
        blocksize=BLOCK,
        quant_type=packing.precision,
        dtype=dtype,
        offset=offset,
        state2=nested_state,
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
    """Let PEFT unpack the layer's weight, to which DoRA adds its update.

    PEFT decides by the weight's class and takes a plain parameter as it is. A layer of HQQ, which it
    recognises by ``W_q``, unpacks its weight itself.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    def dequantize() -> Any:
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            return int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
        return dequantize_4bit(layer.weight.data, state)

    layer.W_q, layer.dequantize = layer.weight.data, dequantize


def constant_attributes(weight: Any) -> Iterator[tuple[Any, str]]:
    """Yield each place of a 4-bit weight's constants as a state, nested ones too, and an attribute name."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if isinstance(getattr(state, name, None), torch.Tensor):
                yield state, name
        state = getattr(state, "state2", None)


def replace_tensors(module: Any, replace: Any) -> None:
    """Replace each constant tensor that a packed layer holds by ``replace(tensor)``, in place."""
    for state, name in constant_attributes(getattr(module, "weight", None)):
        setattr(state, name, replace(getattr(state, name)))
    int8_state: Any = getattr(module, "state", None)
    if getattr(int8_state, "SCB", None) is not None:
        int8_state.CB, int8_state.SCB = module.weight.data, replace(int8_state.SCB)


def plain_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (out, in) of a linear layer, unpacked to ``dtype`` if it is packed; in one launch on CUDA."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        codes, scales = int8_codes(layer)
        if codes is not None and scales is not None:
            return codes.to(dtype).mul_((scales / INT8_CODES)[:, None])
        stored: torch.Tensor = weight.detach().to(dtype)
        return stored
    call = launched("unpack_4bit", state.absmax.device)
    if call is not None:
        nested = state.state2
        parts = (None, None, None) if nested is None else (nested.code, nested.absmax, state.offset)
        plain: torch.Tensor = call(
            weight.data, state.absmax, state.code, *parts, state.blocksize, state.shape, dtype
        )
        return plain
    from bitsandbytes.functional import dequantize_4bit

    # The state's dtype is the compute dtype, which may differ from the one requested.
    state_copy = copy.copy(state)
    state_copy.dtype = dtype
    unpacked: torch.Tensor = dequantize_4bit(weight.data, state_copy)
    return unpacked.reshape(state.shape)


def dequantised_weight(layer: nn.Module) -> torch.Tensor:
    """Return the layer's weight (out, in) in fp32, exactly as its stored codes and constants define it."""
    codes, scales = int8_codes(layer)
    if codes is not None and scales is not None:
        plain: torch.Tensor = codes.float() * scales.float()[:, None] / INT8_CODES
        return plain
    return plain_weight(layer, torch.float32)


def int8_codes(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return LLM.int8's codes (out, in) and scales (out,), which bitsandbytes' forward moves to the state."""
    weight: Any = getattr(layer, "weight", None)
    state: Any = getattr(layer, "state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(state, "SCB", None)
    if scales is None:
        return None, None
    codes = getattr(state, "CB", None)
    return (weight.data if codes is None else codes), scales


def is_packed_layer(layer: Any) -> bool:
    """Return whether a layer itself, not one that it wraps, stores its weight as codes of 4 or 8 bits."""
    if hasattr(layer, "base_layer"):  # PEFT's layers expose the weight of the layer that they wrap
        return False
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return state is not None or int8_codes(layer)[0] is not None


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a loaded model compute in ``dtype`` from now on, leaving the stored codes as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if is_packed_layer(module):
            multiply_in(module, dtype)


def multiply_in(layer: Any, dtype: torch.dtype) -> None:
    """Let a packed layer unpack its weight to ``dtype`` and multiply in it from now on."""
    layer.compute_dtype = dtype
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        state.dtype = dtype


class UnpackedLinear(nn.Linear):
    """A linear layer that takes any dtype and returns it, as the packed layer in whose place it stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's name)
        """Return the outputs (…, out) of inputs (…, in), computed in the dtype of the weight."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


@torch.no_grad()
def unpack_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace packed layers by plain ones with exactly the weights that they stand for, in ``dtype``."""
    layer: Any
    for name, layer in list(model.named_modules()):
        if not is_packed_layer(layer):
            continue
        plain = UnpackedLinear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(plain_weight(layer, dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
