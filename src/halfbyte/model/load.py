"""Owns loading a base at any precision, or its language model alone where nothing else is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.config.schema import Model
from halfbyte.config.section import FOUR_BIT, ComputeDtype, Precision
from halfbyte.errors import ModelError
from halfbyte.faults import is_out_of_memory
from halfbyte.heap import mapped_blocks, release_pages
from halfbyte.libraries import disable_cudnn_attention
from halfbyte.model.merged import check_keeps_training, verified_merge
from halfbyte.model.new_tokens import add_rows, new_ids
from halfbyte.model.precision import (
    DTYPES,
    NAMES,
    Compute,
    choose_compute,
    default_device,
    keep_residual_in_fp32,
    may_train_in_half,
)
from halfbyte.model.resolve import Base
from halfbyte.model.tokenizer import load_tokenizer, read_tokenizer
from halfbyte.model.untrusted import check_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Where multimodal checkpoints keep the language model (Gemma-3 and similar ones).
TEXT_KEYS = {
    r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.",
    r"^language_model\.lm_head": "lm_head",
}
VISION_WORDS = ("vision", "visual", "image", "audio", "multi_modal", "mm_")


@dataclass
class Loaded:
    """Holds a model in memory, the base it was loaded from and how it computes."""

    model: PreTrainedModel
    base: Base
    precision: Precision | None  # None: as the checkpoint stores it
    compute: Compute
    text_only: bool = False


def load_config(base: Base) -> PretrainedConfig:
    """Load the base's configuration, as ``read_config``; its vocabulary has room for the new tokens."""
    config = read_config(Path(base.path), base.name)
    if base.new_tokens:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, new_ids(load_tokenizer(base), base).stop)
    return config


def read_config(folder: Path, name: str) -> PretrainedConfig:
    """Read a folder's configuration.

    Raises:
        ModelError: the file is damaged, transformers does not know the architecture, or would have to run remote
            code.
    """
    from transformers import AutoConfig

    check_config(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture checks its fields in its own way
        raise ModelError(f"{name}: not a model that transformers knows: {error}") from error


def stored_dtype(base: Base) -> torch.dtype:
    """Return the dtype in which a base's weights were published; fp32 if the config names none that we know."""
    config = load_config(base)
    # Multimodal checkpoints name the dtype only at the top level.
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if dtype in NAMES else torch.float32


def load_model(
    base: Base,
    precision: Precision | None,
    *,
    double_quant: bool = True,
    compute_dtype: ComputeDtype = "auto",
    attention: str = "auto",
    compute: Compute | None = None,
) -> Loaded:
    """Load the causal language model of a base.

    Unquantised weights (embeddings, norms, and everything at fp32, bf16 or fp16) are stored in the
    compute dtype, or in ``precision`` where it names a dtype. Pass None as ``precision`` for checkpoints
    that are already quantised, such as AWQ's: they stay as they are.

    Raises:
        ModelError: the checkpoint is not a causal language model, lacks weights, or cannot be loaded.
    """
    if compute is None:
        compute = choose_compute(precision if precision in DTYPES else compute_dtype)  # type: ignore[arg-type]
    config = read_config(Path(base.path), base.name)
    _check_stored_precision(config, base, precision)
    model_class, text_config = language_part(config)
    text_only = text_config is not config
    options: dict[str, Any] = {
        "dtype": compute.dtype,
        # None lets transformers choose: sdpa, or eager where the architecture has no sdpa.
        "attn_implementation": None if attention == "auto" else attention,
        "device_map": {"": compute.device},
        "output_loading_info": True,
    }
    # Even None would hide the checkpoint's own settings and leave random weights.
    if precision is not None:
        options["quantization_config"] = quantisation_config(precision, compute.dtype, double_quant)
    if text_only:
        options |= {"config": text_config, "key_mapping": TEXT_KEYS}
    model = _from_pretrained(model_class, base, options, precision)
    if text_only and vision_modules(model):
        raise ModelError(
            f"{base.name}: has modules beside the language model: {vision_modules(model)[:5]}"
        )
    if precision is None:
        _unpack_compressed(model)
    if base.new_tokens:
        add_rows(model, read_tokenizer(Path(base.path), base.name), load_tokenizer(base), base)
    if compute.dtype == torch.float16 and precision not in DTYPES:
        keep_residual_in_fp32(model)
    return Loaded(model, base, precision, compute, text_only)


def load_at_precision(
    base: Base, precision: Precision | None, double_quant: bool, compute_dtype: ComputeDtype
) -> Loaded:
    """Load a model as ``load_model`` does, at the given precision or at one chosen for the checkpoint.

    Without a given precision, a quantised checkpoint is loaded as it is stored, a merge in a dtype that
    holds it exactly, and any other base in nf4.

    Raises:
        ModelError: as ``load_model``, or the given precision would undo the training in a merge.
        RunError: it is a merge, and not the one that was measured.
    """
    folder = Path(base.path)
    merge = verified_merge(folder)
    if precision is not None:
        check_keeps_training(folder, precision)
    elif stored_method(load_config(base)) is None:
        dtype = choose_compute(compute_dtype).name
        is_exact = merge is None or compute_dtype != "auto" or dtype == merge.kept.dtype
        precision = "nf4" if merge is None else dtype if is_exact else "fp32"
    if not double_quant and precision not in FOUR_BIT:
        raise ModelError(
            f"{base.name}: is loaded in {precision or 'the precision that it is stored in'}, which has no"
            " double quantisation to turn off; leave out --no-double-quant"
        )
    return load_model(base, precision, double_quant=double_quant, compute_dtype=compute_dtype)


def load_for_training(base: Base, settings: Model) -> Loaded:
    """Load the base as a config's ``model`` section says, in fp16 where that is still to be probed.

    Raises:
        ModelError: as ``load_model``, or the precision would undo the training in a merged base.
        RunError: as ``load_at_precision``.
    """
    verified_merge(Path(base.path))
    check_keeps_training(Path(base.path), settings.precision)
    device, compute = default_device(), None
    if may_train_in_half(settings, device):
        compute = Compute(device, torch.float16, "to be probed")
    return load_base(base, settings, compute)


def load_base(base: Base, settings: Model, compute: Compute | None = None) -> Loaded:
    """Load the base as a config's ``model`` section says; ``compute`` overrides its compute dtype.

    Raises:
        ModelError: as ``load_model``.
    """
    return load_model(
        base,
        settings.precision,
        double_quant=settings.double_quant,
        compute_dtype=settings.compute_dtype,
        attention=settings.attention,
        compute=compute,
    )


def load_multimodal(
    base: Base,
    precision: Precision,
    *,
    double_quant: bool = True,
    compute_dtype: ComputeDtype = "auto",
) -> tuple[Loaded, Any]:
    """Load the whole image-and-text model with its processor, for prompts that contain an image.

    Raises:
        ModelError: the checkpoint takes no images.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    compute = choose_compute(precision if precision in DTYPES else compute_dtype)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "dtype": compute.dtype,
        "device_map": {"": compute.device},
        "quantization_config": quantisation_config(precision, compute.dtype, double_quant),
        "output_loading_info": True,
    }
    _check_stored_precision(load_config(base), base, precision)
    model = _from_pretrained(AutoModelForImageTextToText, base, options, precision)
    try:
        processor = AutoProcessor.from_pretrained(base.path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{base.name}: has no processor for images: {error}") from error
    return Loaded(model, base, precision, compute), processor


def vision_modules(model: torch.nn.Module) -> list[str]:
    """Return the names of modules that process images or sound rather than language."""
    return [
        name
        for name, _ in model.named_modules()
        if any(word in part for part in name.split(".") for word in VISION_WORDS)
    ]


def language_part(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """Return the class and configuration of the language model in a base, which may be all of it."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text_config = config.get_text_config()
    if text_config is not config and type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)], text_config
    return AutoModelForCausalLM, config


def quantisation_config(precision: Precision, dtype: torch.dtype, double_quant: bool) -> Any:
    """Return transformers' settings for bitsandbytes, or None where weights stay as they are."""
    if precision in DTYPES:
        return None
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _from_pretrained(
    model_class: Any, base: Base, options: dict[str, Any], precision: Precision | None
) -> Any:
    try:
        with mapped_blocks():
            model, info = model_class.from_pretrained(base.path, trust_remote_code=False, **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{base.name}: cannot be loaded from {base.path}: {error}") from error
    _check_loaded(model, info, base, precision)
    disable_cudnn_attention()
    for module in model.modules():
        # bitsandbytes 0.50 repacks Linear4bit in place on the first evaluation on AVX512-BF16 CPUs,
        # and the packed weights have no gradient. Remove this when its packed path supports autograd.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if getattr(model, "is_loaded_in_8bit", False):
        from halfbyte.model.int8_linear import keep_inputs

        keep_inputs(model, options["dtype"])
    release_pages()
    return model


def stored_method(config: PretrainedConfig) -> str | None:
    """Return how the checkpoint is quantised, such as ``compressed-tensors``; None if it is not."""
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return str(stored["quant_method"] if isinstance(stored, dict) else stored.quant_method)


def _check_stored_precision(
    config: PretrainedConfig, base: Base, precision: Precision | None
) -> None:
    method = stored_method(config)
    if method is not None and precision is not None and method != "bitsandbytes":
        raise ModelError(
            f"{base.name}: the checkpoint is already quantised ({method}); precision {precision} cannot"
            " undo that. Choose the unquantised checkpoint, or leave the precision out where it is optional"
        )
    if method is not None and precision in DTYPES:
        raise ModelError(
            f"{base.name}: the checkpoint is already quantised ({method}); model.precision {precision}"
            " cannot undo that. Choose the unquantised checkpoint"
        )
    if method is None and precision is None:
        raise ModelError(
            f"{base.name}: the checkpoint is not quantised; give a precision, such as nf4 or bf16"
        )


@torch.no_grad()
def _unpack_compressed(model: PreTrainedModel) -> None:
    """Make compressed-tensors unpack its weights, which it does on the first full forward pass."""
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _check_loaded(
    model: PreTrainedModel, info: Any, base: Base, precision: Precision | None
) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{base.name}: the checkpoint lacks {len(missing)} weights, which would be random:"
            f" {', '.join(missing[:5])}"
        )
    if precision in FOUR_BIT:
        quant_types = {
            parameter.quant_type
            for parameter in model.parameters()
            if hasattr(parameter, "quant_type")
        }
        if quant_types != {precision}:
            raise ModelError(
                f"{base.name}: model.precision is {precision}, but the loaded layers are {quant_types}"
            )
