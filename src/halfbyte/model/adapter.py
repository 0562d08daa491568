"""Owns the LoRA adapter: placing it, proving where it sits, saving it, loading it back on its base."""

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
from halfbyte.model.load import Loaded, vision_modules
from halfbyte.run_dir import write_json

if TYPE_CHECKING:
    from peft import PeftModel

BASE_FILE = "base.json"  # beside the adapter: what it belongs to
INITIAL = "initial"  # folder of the start values, where the initialisation changed the base


def attach_adapter(
    loaded: Loaded, settings: Adapter, seed: int, scratch: Path, *, is_main: bool = True
) -> PeftModel:
    """Put a new LoRA adapter on a base and check that it sits where the config says.

    Trainable weights are fp32. The base is frozen. PiSSA and OLoRA change the base in memory; their
    start values are kept in ``scratch`` so that ``save_adapter`` can express what was learnt
    against the published base.

    Raises:
        ModelError: a target matches no layer, a vision module would be adapted, the number of
            trainable weights is not what the formula gives, or PEFT refuses the combination.
    """
    from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq

    model = loaded.model
    _check_targets(model, settings)
    if settings.init == "loftq" and loaded.compute.device.type != "cuda":
        raise ModelError(
            "adapter.init is loftq, which PEFT computes on CUDA alone; use default here"
        )
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
    )
    torch.manual_seed(seed)
    try:
        adapted: PeftModel = get_peft_model(model, config)
        if settings.init == "loftq":
            replace_lora_weights_loftq(adapted, str(Path(loaded.base.path) / "model.safetensors"))
    except (ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"adapter: PEFT refuses {settings.model_dump()}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if settings.init in ("pissa", "olora") and is_main:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(str(scratch / INITIAL))
        adapted.peft_config["default"].init_lora_weights = init
    _check_placement(adapted, settings)
    return adapted


def describe_model(loaded: Loaded, model: PeftModel) -> str:
    """What was loaded, what computes and what learns, in three lines."""
    base, compute = loaded.base, loaded.compute
    learning = sum(p.numel() for p in trainable_parameters(model).values())
    frozen_bytes = weights_bytes(model) - sum(
        p.nbytes for p in trainable_parameters(model).values()
    )
    return (
        f"base: {base.name}, {(num_parameters(model) - learning) / 1e6:.1f} M parameters,"
        f" {frozen_bytes / 1e6:.1f} MB in {loaded.precision},"
        f" {len(vision_modules(loaded.model))} vision modules\n"
        f"compute: {compute.name} on {compute.device} ({compute.reason})\n"
        f"adapter: {learning / 1e6:.2f} M weights on {len(adapted_layers(model))} layers"
    )


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def adapters_kept(model: nn.Module) -> Iterator[None]:
    """Give every trainable parameter its dtype and value back at the end.

    TRL 1.16 casts the adapters of a quantised base to bf16 on construction. That loses small
    updates, is 24 times slower where the CPU has no bf16, and breaks the GradScaler under fp16
    (TRL issue 4901). Can go when TRL lets the caller choose.
    """
    kept = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    yield
    for name, parameter in trainable_parameters(model).items():
        parameter.data = kept[name]


def save_adapter(model: PeftModel, loaded: Loaded, folder: Path, scratch: Path) -> None:
    """Write the adapter and what base it belongs to, then read it back and compare.

    Raises:
        RunError: a value is not finite, or the file differs from memory.
    """
    bad = [name for name, p in trainable_parameters(model).items() if not torch.isfinite(p).all()]
    if bad:
        raise RunError(f"adapter: {len(bad)} tensors hold NaN or infinity: {bad[:3]}; not saved")
    initial = scratch / INITIAL
    options = {"path_initial_model_for_weight_conversion": str(initial)} if initial.is_dir() else {}
    # The name for others, not the place on this disk.
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = loaded.base.name, loaded.base.revision
    model.save_pretrained(str(folder), **options)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    write_json(
        folder / BASE_FILE,
        {
            **loaded.base.as_json(),
            "model_class": type(loaded.model).__name__,
            "precision": loaded.precision,
            "compute_dtype": loaded.compute.name,
        },
    )
    if not options:
        _check_saved(model, folder)


def load_adapter(loaded: Loaded, folder: Path, name: str = "default") -> PeftModel:
    """Put a saved adapter on its base, beside others or alone, for use and not for training.

    Raises:
        RunError: the adapter belongs to another base, some of its weights find no place, or it
            changes nothing.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    from halfbyte.run_dir import read_json

    told = read_json(folder / BASE_FILE)
    if told["fingerprint"] != loaded.base.fingerprint:
        raise RunError(
            f"{folder}: was trained on {told['name']} (fingerprint {told['fingerprint'][:12]}), not on"
            f" {loaded.base.name} ({loaded.base.fingerprint[:12]})"
        )
    try:
        saved = set(load_peft_weights(str(folder), device="cpu"))
        if isinstance(loaded.model, PeftModel):
            model = loaded.model
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(loaded.model, str(folder), name)
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise RunError(f"{folder}: cannot be read: {error}") from error
    placed = set(get_peft_model_state_dict(model, adapter_name=name))
    if saved != placed:
        odd = sorted(saved ^ placed)
        raise RunError(f"{folder}: {len(odd)} adapter weights do not fit the model: {odd[:3]}")
    learnt = [p for n, p in model.named_parameters() if "lora_B" in n and f".{name}" in n]
    if not any(bool(p.abs().max() > 0) for p in learnt):
        raise RunError(f"{folder}: the adapter changes nothing: every B matrix is zero")
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
        # PEFT gives every expert its own, of twice the rank where two matrices lie in one.
        copies = int(getattr(layer, "num_experts", 1))
        rank = settings.r if copies == 1 else int(layer.r["default"])  # type: ignore[index]
        expected += copies * rank * (int(features_in) + int(features_out))  # type: ignore[arg-type]
        expected += int(features_out) if settings.dora else 0  # type: ignore[arg-type]
    found = sum(p.numel() for p in trainable_parameters(model).values())
    if not layers or found != expected:
        raise ModelError(
            f"adapter: {found} trainable weights on {len(layers)} layers, but r {settings.r} gives"
            f" {expected}"
        )


def _check_saved(model: PeftModel, folder: Path) -> None:
    from peft import get_peft_model_state_dict, load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    memory = get_peft_model_state_dict(model)
    wrong = [k for k in memory if k not in saved or not torch.equal(saved[k], memory[k].cpu())]
    if wrong or len(saved) != len(memory):
        raise RunError(f"{folder}: the saved adapter differs from memory in {wrong[:3]}")


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base alone: a model with LoRA layers in place computes without them."""
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
