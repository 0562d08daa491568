"""Owns the choice of layers that represent a whole model: which to trace, and how often each counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from halfbyte.model.skeleton import layer_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_KINDS = 6  # a model with more kinds of layers is traced whole


def layer_kinds(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """Return a key for each decoder layer; layers with equal keys have equal shapes and attention."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    kinds = []
    for index, layer in enumerate(layer_list(model)):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        windows = {getattr(part, "sliding_window", None) for part in layer.modules()}
        window = max((w for w in windows if isinstance(w, int)), default=None)
        kinds.append((f"{types[index]} layer" if types else "layer", window, shapes))
    return kinds


@dataclass(frozen=True)
class Cut:
    """Names the layers that represent a model: a base set, and for each repeated kind one extra layer.

    ``extra[i] = (layer, times)``: a quantity of the whole model is that of ``base`` plus, for each
    kind, ``times`` times what ``layer`` adds to it.
    """

    base: tuple[int, ...]
    extra: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer that is needed."""
        return tuple(sorted({*self.base, *(layer for layer, _ in self.extra)}))


def cut(kinds: list[tuple[Any, ...]]) -> Cut:
    """Choose the first layer and the last of each kind, and one extra layer of each repeated kind.

    The peaks of a pass come at its first layers or at its last ones; only the layers between them add
    the same amount each.
    """
    if len(set(kinds)) > MAX_KINDS:
        return Cut(tuple(range(len(kinds))), ())
    base = {0} | {max(i for i, other in enumerate(kinds) if other == kind) for kind in set(kinds)}
    extra = []
    for kind in dict.fromkeys(kinds):
        spare = [i for i, other in enumerate(kinds) if other == kind and i not in base]
        if spare:
            extra.append((spare[0], len(spare)))
    return Cut(tuple(sorted(base)), tuple(extra))


def keep_layers(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], types: list[str] | None
) -> None:
    """Reduce a model to these layers in place.

    Args:
        model: the model to change.
        layers: layers by their index in the whole model.
        types: the whole model's ``layer_types``, if it has any.
    """
    config: Any = model.config.get_text_config()
    current = layer_list(model)
    name = next(name for name, module in model.named_modules() if module is current)
    model.set_submodule(name, nn.ModuleList(layers.values()))
    config.num_hidden_layers = len(layers)
    kept = [types[i] for i in layers] if types else None
    if (
        kept and kept != config.layer_types
    ):  # some configurations derive it from the number of layers
        config.layer_types = kept
    for index, layer in enumerate(layers.values()):
        part: Any
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = index  # where its keys and values go in the KV cache
