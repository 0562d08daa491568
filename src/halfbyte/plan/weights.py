"""Owns what loading a model takes: its parameters, and its bytes at every precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.config.section import Precision
from halfbyte.errors import ModelError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.precision import DTYPES
from halfbyte.model.quantised import Packing
from halfbyte.model.skeleton import (
    UnquantisedWeights,
    build,
    layer_list,
    packed_layers,
    unquantised_weights,
)
from halfbyte.plan.formats import GGUF_TYPES, awq_bytes, gguf_bytes
from halfbyte.plan.layer_cut import keep_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Name in the table → precision, double quantisation.
STORED: dict[str, tuple[Precision, bool]] = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp16": ("fp16", False),
    "int8": ("int8", False),
    "nf4": ("nf4", True),
    "nf4_single": ("nf4", False),
    "fp4": ("fp4", True),
}


@dataclass(frozen=True)
class Stored:
    """Holds the bytes of a model at one precision.

    Attributes:
        reported_bytes: parameters and buffers, as transformers' ``get_memory_footprint()`` reports them.
        constants_bytes: quantisation constants, which ``reported_bytes`` leaves out.
        buffers_bytes: the part of ``reported_bytes`` that belongs to buffers.
    """

    reported_bytes: int
    constants_bytes: int
    buffers_bytes: int

    @property
    def true_bytes(self) -> int:
        """All bytes that the model takes in memory."""
        return self.reported_bytes + self.constants_bytes


@dataclass(frozen=True)
class Load:
    """Holds what loading a model takes.

    Attributes:
        model_class: the model's class in transformers.
        num_parameters: the number of parameters; tied weights count once.
        num_packed: the number of parameters that loading in int8 or 4 bits packs.
        stored: bytes in memory, by precision.
        files: bytes of tensors in a GGUF or AWQ file of the language model, by file type.
        gguf_layer_bytes: bytes of an average layer of the q4_k_m file, to decide how many fit on a GPU.
        no_files: file types that do not support this model, and why.
        unquantised: the weights that quantisation leaves as they are, and why.
    """

    model_class: str
    num_parameters: int
    num_packed: int
    stored: dict[str, Stored]
    files: dict[str, int]
    gguf_layer_bytes: int
    no_files: dict[str, str]
    unquantised: list[UnquantisedWeights]


def load_bytes(
    model: PreTrainedModel, precision: Precision, double_quant: bool, dtype: torch.dtype
) -> Stored:
    """Return the bytes of a meta model at a precision, with its unpacked weights in ``dtype``.

    The model must have been built in ``dtype``: some buffers have that dtype, others stay in fp32.
    """
    parameters = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    buffers = sum(b.nbytes for b in model.buffers())
    if precision in DTYPES:
        return Stored(parameters + buffers, 0, buffers)
    packing, constants = Packing(precision, double_quant), 0
    for layer in packed_layers(model).values():
        count = layer.weight.numel()
        parameters += packing.codes_bytes(count) - count * dtype.itemsize
        constants += packing.constants_bytes(count, layer.weight.shape[0])
    return Stored(parameters + buffers, constants, buffers)


def load_plan(config: PretrainedConfig, *, text_only: bool) -> Load:
    """Return the bytes at every precision; quantised models keep their unpacked weights in bf16.

    Raises:
        ModelError: no model can be built from the configuration.
    """
    models = {
        dtype: build(config, dtype, text_only=text_only)
        for dtype in (torch.float32, torch.bfloat16)
    }
    models[torch.float16] = models[torch.bfloat16]  # exactly the same size
    stored = {}
    for name, (precision, double) in STORED.items():
        dtype = DTYPES.get(precision, torch.bfloat16)
        stored[name] = load_bytes(models[dtype], precision, double, dtype)
    model = models[torch.bfloat16]
    text = model if text_only else build(config, torch.bfloat16, text_only=True)
    files: dict[str, int] = {}
    no_files: dict[str, str] = {}
    try:
        files["awq"] = awq_bytes(text, text.config)
    except ModelError as error:
        no_files["awq"] = str(error)
    files |= {f"gguf_{kind}": gguf_bytes(text, text.config, kind) for kind in GGUF_TYPES}
    # The file without its layers has only embeddings and head.
    num_layers = len(layer_list(text))
    bare = build(config, torch.bfloat16, text_only=True)
    keep_layers(bare, {}, None)
    layers_bytes = files["gguf_q4_k_m"] - gguf_bytes(bare, text.config, "q4_k_m")
    return Load(
        model_class=type(model).__name__,
        num_parameters=num_parameters(model),
        num_packed=sum(layer.weight.numel() for layer in packed_layers(model).values()),
        stored=stored,
        files=files,
        gguf_layer_bytes=layers_bytes // num_layers,
        no_files=no_files,
        unquantised=unquantised_weights(model),
    )
