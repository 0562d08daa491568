"""Owns what a model takes to load: parameters and bytes at every precision, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.config.section import Precision
from halfbyte.errors import ModelError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.precision import DTYPES
from halfbyte.model.quantised import Packing
from halfbyte.model.skeleton import Unpacked, build, layer_list, packed_layers, unpacked
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
    """Bytes of a model at one precision.

    Attributes:
        reported_bytes: as transformers' ``get_memory_footprint()`` says: parameters and buffers.
        constants_bytes: quantisation constants, which that figure leaves out.
        buffers_bytes: the part of ``reported_bytes`` that is no parameter.
    """

    reported_bytes: int
    constants_bytes: int
    buffers_bytes: int

    @property
    def true_bytes(self) -> int:
        """Every byte that lies in memory."""
        return self.reported_bytes + self.constants_bytes


@dataclass(frozen=True)
class Load:
    """What a model takes to load.

    Attributes:
        model_class: its class in transformers.
        num_parameters: tied weights count once.
        num_packed: how many of them int8 and 4-bit loading pack.
        stored: by precision, in memory.
        files: by file type, bytes of tensors in a GGUF or AWQ file of the language model.
        gguf_layer_bytes: an average layer of the q4_k_m file, for placing layers on a GPU or off it.
        no_files: file types that this model cannot take, and why.
        left: what packing leaves as it is, and why.
    """

    model_class: str
    num_parameters: int
    num_packed: int
    stored: dict[str, Stored]
    files: dict[str, int]
    gguf_layer_bytes: int
    no_files: dict[str, str]
    left: list[Unpacked]


def load_bytes(
    model: PreTrainedModel, precision: Precision, double_quant: bool, dtype: torch.dtype
) -> Stored:
    """Bytes of a meta model at a precision, what is not packed lying in ``dtype``.

    The model must have been built in ``dtype``: some buffers follow it, others stay fp32.
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
    """Bytes at every precision; quantised ones keep their unpacked weights in bf16.

    Raises:
        ModelError: no model can be built from the configuration.
    """
    models = {
        dtype: build(config, dtype, text_only=text_only)
        for dtype in (torch.float32, torch.bfloat16)
    }
    models[torch.float16] = models[torch.bfloat16]  # of the same size, byte for byte
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
    # The rest of the file: embeddings and head, once more without layers.
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
        left=unpacked(model),
    )
