"""Owns models without weights: built on the meta device and quantised in shape only."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halfbyte.config.section import FOUR_BIT, Precision
from halfbyte.errors import ModelError
from halfbyte.model.load import language_part, quantisation_config
from halfbyte.model.precision import DTYPES
from halfbyte.model.quantised import Packing, pack_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = "all experts share one tensor, and bitsandbytes packs only linear layers"


@dataclass(frozen=True)
class UnquantisedWeights:
    """Counts weights that quantisation leaves as they are, and says why."""

    what: str
    num_parameters: int
    why: str


def build(
    config: PretrainedConfig, dtype: torch.dtype, *, text_only: bool, attention: str | None = None
) -> PreTrainedModel:
    """Build the model of a configuration on the meta device: shapes and dtypes without values.

    ``text_only``: build its language model, as halfbyte trains it, else all that the checkpoint holds.
    ``attention``: the implementation, by transformers' name.

    Raises:
        ModelError: no model can be built from this configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_class: Any = AutoModelForCausalLM
    if text_only:
        model_class, config = language_part(config)
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        model_class = AutoModelForImageTextToText
    from_config = getattr(model_class, "from_config", None) or model_class._from_config
    try:
        with torch.device("meta"):
            options = {"attn_implementation": attention} if attention else {}
            model: PreTrainedModel = from_config(copy.deepcopy(config), dtype=dtype, **options)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"no model can be built from this {config.model_type} configuration: {error}"
        ) from error
    model.tie_weights()
    return model


def build_for_step(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, traced: str
) -> tuple[PreTrainedModel, str]:
    """Build a language model whose step is traced, and settle its attention.

    Args:
        config: of the model.
        dtype: of the matrix products.
        attention: ``model.attention`` of the config.
        traced: transformers' name of the attention that is traced in place of sdpa.

    Returns:
        the model, which attends eagerly where that is asked for, is all that the architecture has, or where
        it has a table of attentions of its own; and the attention that ``auto`` comes to.

    Raises:
        ModelError: no model can be built, or the architecture lacks the attention.
    """
    try:
        wanted = "eager" if attention == "eager" else traced
        model = build(config, dtype, text_only=True, attention=wanted)
    except ModelError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
        model = build(config, dtype, text_only=True, attention="eager")
    settled = settle_attention(model, attention)
    check_attention(model, settled)
    if settled == "eager" != attention:
        model = build(config, dtype, text_only=True, attention="eager")
    return model, settled


def settle_attention(model: PreTrainedModel, attention: str) -> str:
    """Return the attention that transformers takes for ``model.attention``: ``auto`` is sdpa, else eager."""
    if attention != "auto":
        return attention
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def check_attention(model: PreTrainedModel, attention: str) -> None:
    """Refuse an attention that transformers would refuse, before anything is downloaded.

    Raises:
        ModelError: the architecture has no such attention.
    """
    known = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    if attention in known and not getattr(model, known[attention], True):
        raise ModelError(
            f"{type(model).__name__} has no {attention} attention in transformers; set"
            " model.attention=auto"
        )


def _unconverted_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of modules that transformers keeps from bitsandbytes, the head among them."""
    from transformers.quantizers.base import HfQuantizer

    names: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, None, model._keep_in_fp32_modules
    )
    return names


def packed_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers that transformers hands to bitsandbytes, by name."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    unconverted = _unconverted_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, unconverted)
    }


def unquantised_weights(model: PreTrainedModel) -> list[UnquantisedWeights]:
    """List the weights that a quantised load leaves in 16 or 32 bits, the largest first."""
    packed = {id(layer.weight) for layer in packed_layers(model).values()}
    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    tied = head is not None and head.weight is inputs.weight
    counts: Counter[tuple[str, str]] = Counter()
    seen = set(packed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, nn.Embedding):
                reason = "a table that is looked up, not multiplied"
                key = ("embedding and head (one matrix)" if tied else "embedding", reason)
                key = key if module is inputs else ("other embeddings", reason)
            elif module is head:
                key = ("head", "transformers keeps the output layer exact")
            elif isinstance(module, nn.Linear) and name == "weight":
                key = ("linear layers that transformers keeps", "listed by the architecture")
            elif parameter.ndim == 3:
                key = ("experts", EXPERTS)
            elif parameter.ndim == 1:
                key = ("norms and biases", "vectors: too small to matter")
            else:
                key = ("other matrices", "not linear layers of PyTorch")
            counts[key] += parameter.numel()
    return [UnquantisedWeights(what, count, why) for (what, why), count in counts.most_common()]


def quantise(
    model: PreTrainedModel, precision: Precision, double_quant: bool, dtype: torch.dtype
) -> None:
    """Give a meta model the layers and storage that a quantised load would give it, in place.

    Raises:
        ModelError: the model has no linear layer to quantise.
    """
    if precision in DTYPES:
        return
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    if not packed_layers(model):
        raise ModelError(
            f"{type(model).__name__}: has no linear layer to quantise; use model.precision=bf16"
        )
    settings = quantisation_config(precision, dtype, double_quant)
    replace_with_bnb_linear(model, _unconverted_modules(model), settings)
    packing = Packing(precision, double_quant)
    for module in model.modules():
        pack_shapes(module, packing, dtype)
    if precision == "int8":
        from halfbyte.model.int8_linear import keep_inputs

        keep_inputs(model, dtype)
    flagged: Any = model
    flagged.is_loaded_in_4bit = precision in FOUR_BIT
    flagged.is_loaded_in_8bit = precision == "int8"


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a language model.

    Raises:
        ModelError: they are not found.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ModelError(f"{type(model).__name__}: its {num_layers} decoder layers are not found")
