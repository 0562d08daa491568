"""Owns the LoRA adapter: attaching it, checking where it sits, saving it, loading it onto its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from halfbyte.config.schema import Adapter
from halfbyte.errors import ModelError, RunError
from halfbyte.model.footprint import num_parameters, weights_bytes
from halfbyte.model.identity import AdapterBase, check_same_base
from halfbyte.model.load import Loaded, vision_modules
from halfbyte.model.new_tokens import new_ids, row_layers, row_targets, set_rows, train_rows_apart
from halfbyte.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BASE_FILE = "base.json"  # beside the adapter: the base that it belongs to
NO_IDS = range(0)
INITIAL_FOLDER = "initial"  # holds the initial adapter where the initialisation changes the base


def attach_adapter(
    loaded: Loaded, settings: Adapter, seed: int, scratch: Path, *, is_main: bool = True
) -> PeftModel:
    """Attach a new LoRA adapter to a base and check that it sits where the config says.

    Trainable weights are fp32 and the base is frozen. PiSSA and OLoRA change the base in memory; the
    initial adapter is saved in ``scratch`` so that ``save_adapter`` can express what was learnt
    relative to the published base.

    Raises:
        ModelError: a target matches no layer, a vision module would be adapted, the number of
            trainable weights differs from the formula, or PEFT rejects the combination.
    """
    if settings.init == "loftq" and loaded.compute.device.type != "cuda":
        raise ModelError(
            "adapter.init is loftq, which PEFT computes only on CUDA; use default here"
        )
    base, added = loaded.base, NO_IDS
    if base.new_tokens:
        added = new_ids(load_tokenizer(base), base)
    adapted = place_adapter(loaded.model, settings, seed, Path(base.path), added)
    if added:
        # With a name, PEFT's checkpoints would hold the whole embedding, since it has grown; where there is none, the
        # first checkpoint gives it one.
        adapted.peft_config["default"].base_model_name_or_path = ""
    if settings.init in ("pissa", "olora") and is_main:
        init = adapted.peft_config["default"].init_lora_weights
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(str(scratch / INITIAL_FOLDER))
        adapted.peft_config["default"].init_lora_weights = init
    return adapted


def place_adapter(
    model: PreTrainedModel,
    settings: Adapter,
    seed: int,
    weights: Path | None = None,
    added: range = NO_IDS,
) -> PeftModel:
    """Put a new LoRA adapter with trainable fp32 weights on a model, and check where it sits.

    Args:
        model: the base, which may be on the meta device.
        settings: where the adapter sits and how it is initialised.
        seed: the seed of its random values.
        weights: the base's folder, from which LoftQ reads the unquantised weights.
        added: ids of new tokens, whose rows of embedding and head are trained.

    Raises:
        ModelError: as ``attach_adapter``.
    """
    from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq

    _check_targets(model, settings)
    # LoftQ starts from plain LoRA and then fits the quantisation error (PEFT replaces the values).
    init: Any = {"default": True, "loftq": True}.get(settings.init, settings.init)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=init,
        trainable_token_indices=row_targets(model, added),
    )
    torch.manual_seed(seed)
    try:
        adapted: PeftModel = get_peft_model(model, config)
        if settings.init == "loftq":
            replace_lora_weights_loftq(adapted, str(weights and weights / "model.safetensors"))
    except (ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"adapter: PEFT rejects {settings.model_dump()}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    train_rows_apart(adapted)
    # PEFT's card is an empty template, and takes a fifth of the time of a checkpoint to write.
    adapted.create_or_update_model_card = lambda folder: None
    _check_placement(adapted, settings)
    return adapted


def describe_model(loaded: Loaded, model: PeftModel) -> str:
    """Describe in three lines what was loaded, what computes and what is trained."""
    base, compute = loaded.base, loaded.compute
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    frozen_bytes = weights_bytes(model) - sum(
        p.nbytes for p in trainable_parameters(model).values()
    )
    return (
        f"base: {base.name}, {(num_parameters(model) - num_trainable) / 1e6:.1f} M parameters,"
        f" {frozen_bytes / 1e6:.1f} MB in {loaded.precision},"
        f" {len(vision_modules(loaded.model))} vision modules\n"
        f"compute: {compute.name} on {compute.device} ({compute.reason})\n"
        f"adapter: {num_trainable / 1e6:.2f} M weights on {len(adapted_layers(model))} layers"
    )


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the LoRA layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer updates, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def zero_trained_only(model: nn.Module) -> None:
    """Let ``model.zero_grad`` visit the trained parameters alone: it walks all modules for them otherwise."""
    trained = list(trainable_parameters(model).values())

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    setattr(model, "zero_grad", zero_grad)  # noqa: B010 (a method, on purpose)


@contextmanager
def adapters_kept(model: nn.Module) -> Iterator[None]:
    """Restore the memory, dtype and value of every trainable parameter on exit.

    TRL 1.16 casts the adapters of a quantised base to bf16 on construction. That loses small
    updates, is 24 times slower on a CPU without bf16, and breaks the GradScaler under fp16
    (TRL issue 4901). Remove this when TRL lets the caller choose.
    """
    saved = {name: (p.data, p.data.clone()) for name, p in trainable_parameters(model).items()}
    yield
    for name, parameter in trainable_parameters(model).items():
        parameter.data, values = saved[name]
        parameter.data.copy_(values)


def save_adapter(model: PeftModel, loaded: Loaded, folder: Path, scratch: Path) -> None:
    """Write the adapter and the base that it belongs to, then read it back and compare.

    Raises:
        RunError: a value is not finite, or the file differs from memory.
    """
    non_finite = [
        name for name, p in trainable_parameters(model).items() if not torch.isfinite(p).all()
    ]
    if non_finite:
        raise RunError(
            f"adapter: {len(non_finite)} tensors hold NaN or infinity: {non_finite[:3]}; not saved"
        )
    initial = scratch / INITIAL_FOLDER
    options = {"path_initial_model_for_weight_conversion": str(initial)} if initial.is_dir() else {}
    # Record the published name, not the path on this disk.
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = loaded.base.name, loaded.base.revision
    model.save_pretrained(str(folder), save_embedding_layers=False, **options)
    AdapterBase(
        **loaded.base.identity.as_json(),
        model_class=type(loaded.model).__name__,
        precision=loaded.precision,
        compute_dtype=loaded.compute.name,
    ).write(folder / BASE_FILE)
    difference = "" if options else saved_difference(model, folder)
    if difference:
        raise RunError(f"{folder}: {difference}")


def load_adapter(loaded: Loaded, folder: Path, name: str = "default") -> PeftModel:
    """Load a saved adapter onto its base for inference, alone or beside other adapters.

    Raises:
        RunError: the adapter belongs to another base, its weights do not match the model's adapter
            layers, or it changes nothing.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    trained_on = AdapterBase.read(folder / BASE_FILE)
    check_same_base(trained_on, loaded.base.identity, f"{folder}: was trained on")
    try:
        saved_keys = set(load_peft_weights(str(folder), device="cpu"))
        if isinstance(loaded.model, PeftModel):
            model = loaded.model
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(loaded.model, str(folder), name)
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise RunError(f"{folder}: cannot be read: {error}") from error
    model_keys = set(
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    )
    if saved_keys != model_keys:
        mismatched = sorted(saved_keys ^ model_keys)
        raise RunError(
            f"{folder}: {len(mismatched)} adapter weights do not fit the model: {mismatched[:3]}"
        )
    b_matrices = [p for n, p in model.named_parameters() if "lora_B" in n and f".{name}" in n]
    if not any(bool(p.abs().max() > 0) for p in b_matrices):
        raise RunError(f"{folder}: the adapter changes nothing: every B matrix is zero")
    set_rows(model)
    model.eval()
    return model


def _linear_names(model: nn.Module) -> set[str]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _check_targets(model: nn.Module, settings: Adapter) -> None:
    if settings.targets == "all-linear":
        return
    names = _linear_names(model)
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ModelError(
                f"adapter.targets: {target!r} matches no linear layer; allowed: all-linear, or any of"
                f" {', '.join(known)}"
            )


def _check_placement(model: PeftModel, settings: Adapter) -> None:
    layers = adapted_layers(model)
    vision = [name for name in vision_modules(model) if name in layers]
    if vision:
        raise ModelError(f"adapter: {len(vision)} vision modules would be adapted: {vision[:3]}")
    expected = 0
    for layer in layers.values():
        features_in, features_out = layer.in_features, layer.out_features
        # PEFT adapts every expert on its own, with twice the rank where one tensor holds two matrices.
        num_experts = int(getattr(layer, "num_experts", 1))
        rank = settings.r if num_experts == 1 else int(layer.r["default"])  # type: ignore[index]
        expected += num_experts * rank * (int(features_in) + int(features_out))  # type: ignore[arg-type]
        expected += int(features_out) if settings.dora else 0  # type: ignore[arg-type]
    rows = {id(p): p for layer in row_layers(model) for p in layer.trainable_tokens_delta.values()}
    expected += sum(row.numel() for row in rows.values())
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    if not layers or num_trainable != expected:
        raise ModelError(
            f"adapter: {num_trainable} trainable weights on {len(layers)} layers, but r={settings.r}"
            f" should give {expected}"
        )


def saved_difference(model: PeftModel, folder: Path) -> str:
    """Return how the adapter in a folder differs from that in memory, or ""."""
    from peft import get_peft_model_state_dict, load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [name for name in weights if name not in saved or not _same(saved[name], weights[name])]
    wrong += sorted(saved.keys() - weights.keys())
    return f"the saved adapter differs from memory in {wrong[:3]}" if wrong else ""


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes, NaN included."""
    return torch.equal(*(t.cpu().contiguous().view(torch.uint8) for t in (ours, theirs)))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Turn the LoRA layers off, so that the model computes as its base alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
