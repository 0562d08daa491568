"""Owns which layers stand for all: one of each kind, and how often its quantities count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from halfbyte.model.skeleton import layer_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_KINDS = 6  # a model of more kinds of layers is traced whole


def layer_kinds(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """For each decoder layer a key; layers with equal keys have equal shapes and attention."""
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
    """Which layers stand for all: a base set, and for each kind one layer more and how often.

    ``more[i] = (layer, times)``: a quantity of the whole model is that of ``base`` plus, for each
    kind, ``times`` times what ``layer`` adds to it.
    """

    base: tuple[int, ...]
    more: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer that is needed."""
        return tuple(sorted({*self.base, *(layer for layer, _ in self.more)}))


def cut(kinds: list[tuple[Any, ...]]) -> Cut:
    """Choose the first layer and the last of each kind; a spare for each repeated kind.

    The peaks of a pass come at its first layers or at its last ones; only what is added between
    them adds the same each time.
    """
    if len(set(kinds)) > MAX_KINDS:
        return Cut(tuple(range(len(kinds))), ())
    base = {0} | {max(i for i, own in enumerate(kinds) if own == kind) for kind in set(kinds)}
    more = []
    for kind in dict.fromkeys(kinds):
        spare = [i for i, own in enumerate(kinds) if own == kind and i not in base]
        if spare:
            more.append((spare[0], len(spare)))
    return Cut(tuple(sorted(base)), tuple(more))


def keep_layers(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], types: list[str] | None
) -> None:
    """Leave only these layers, by their place in the whole model, in place.

    ``types``: the whole model's ``layer_types``, if it has any.
    """
    config: Any = model.config.get_text_config()
    current = layer_list(model)
    name = next(name for name, module in model.named_modules() if module is current)
    model.set_submodule(name, nn.ModuleList(layers.values()))
    config.num_hidden_layers = len(layers)
    kept = [types[i] for i in layers] if types else None
    if kept and kept != config.layer_types:  # some configurations work it out from the number
        config.layer_types = kept
    for place, layer in enumerate(layers.values()):
        part: Any
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = place  # where its keys and values go in the cache
