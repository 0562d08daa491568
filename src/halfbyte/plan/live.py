"""Owns counting live tensor bytes: exactly, operation by operation, on tensors that hold no data."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEQUANTISED = "dequantised"


@dataclass
class Peak:
    """The largest sum of live bytes in one phase, and what it was made of."""

    total_bytes: int = 0
    terms: Counter[str] = field(default_factory=Counter)


class Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages of all tensors born inside, from birth to death.

    Attributes:
        total_bytes: what lives now.
        most_bytes: the most that lived at once; may be set back.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total_bytes = self.most_bytes = 0
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(out, {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))})
        return out

    def _count(self, out: Any, known: set[int]) -> None:
        """Count what is new in a result; ``known``: storages that were there before."""
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive and key not in known:
                died = functools.partial(self._died, key)
                self._alive[key] = storage.nbytes(), weakref.ref(storage, died)
                self._grow(key, storage.nbytes())

    def _died(self, key: int, _: Any) -> None:
        self._shrink(key, self._alive.pop(key)[0])

    def _grow(self, key: int, size: int) -> None:
        self.total_bytes += size
        self.most_bytes = max(self.most_bytes, self.total_bytes)

    def _shrink(self, key: int, size: int) -> None:
        self.total_bytes -= size


class LiveBytes(Births):  # type: ignore[no-untyped-call]
    """Live bytes by what they are and when.

    A storage is counted under the ``term`` that holds when it is born; ``peaks`` keeps, for each
    ``phase``, the moment with the most live bytes, ``most`` the largest sum of each term. Tensors
    given to ``ignore`` (weights, optimizer states) are counted elsewhere. Works on fake tensors, which
    have sizes but no memory, so that a step of any model is counted in a second.

    Questions about values, which such tensors cannot answer, are answered with 1: models ask
    whether rows are unpadded and unpacked, and ours are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.term = ""
        self.peaks: dict[str, Peak] = {}
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()  # of each term by itself, whenever that was
        self.kept_bytes = 0
        self._ignored: set[int] = set()
        self._kept: list[Any] = []
        self._terms: dict[int, str] = {}
        self._born_as = ""

    def enter(self, phase: str, term: str) -> None:
        """What happens from now on belongs to ``phase``; what is born, to ``term``."""
        self.phase, self.term = phase, term
        self.peaks.setdefault(phase, Peak())
        self._mark()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this tensor's storage."""
        storage = tensor.untyped_storage()
        self._kept.append(storage)  # an address counts only as long as it is taken
        self._ignored.add(storage._cdata)

    def move(self, tensor: torch.Tensor, term: str) -> None:
        """Count this tensor's storage under another term from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            size, _ = self._alive[key]
            self.now[self._terms[key]] -= size
            self._add(key, size, term)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        name = func.name()
        if func is torch.ops.aten._grouped_mm.default:
            # Its shape rule accepts bf16 alone, its kernels other dtypes too (torch 2.13).
            out = args[0].new_empty(_grouped_shape(*args[:3]))
        elif name == "bitsandbytes::int8_vectorwise_quant":
            out = func(args[0])  # without outlier columns: how many there are, only data tells
        elif name == "bitsandbytes::int8_mixed_scaled_mm":
            out = args[0].new_empty((*args[1].shape[:-1], args[2].shape[0])), None
        else:
            out = func(*args, **options)
        inside_bytes = 0
        self._born_as = DEQUANTISED if name == "bitsandbytes::dequantize_4bit" else self.term
        if name == "bitsandbytes::gemm_4bit":
            inside_bytes = _gemm_inside_bytes(args, options)
        self._count(out, self._ignored)
        if inside_bytes:
            within = self.now[DEQUANTISED] + inside_bytes
            self.most[DEQUANTISED] = max(self.most[DEQUANTISED], within)
            self._mark(inside_bytes)
        return out

    def _grow(self, key: int, size: int) -> None:
        self._add(key, size, self._born_as)
        super()._grow(key, size)
        self._mark()

    def _shrink(self, key: int, size: int) -> None:
        self.now[self._terms.pop(key)] -= size
        super()._shrink(key, size)

    def _add(self, key: int, size: int, term: str) -> None:
        self._terms[key] = term
        self.now[term] += size
        self.most[term] = max(self.most[term], self.now[term])

    def _mark(self, inside_bytes: int = 0) -> None:
        peak = self.peaks[self.phase]
        if self.total_bytes + inside_bytes > peak.total_bytes:
            peak.total_bytes = self.total_bytes + inside_bytes
            peak.terms = Counter(self.now)
            if inside_bytes:
                peak.terms[DEQUANTISED] += inside_bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _gemm_inside_bytes(args: Any, options: dict[str, Any]) -> int:
    """Bytes that bitsandbytes 0.50 takes inside a 4-bit product: the weight, and its block maxima."""
    num_weights = args[2][0] * args[2][1]
    inside = num_weights * args[0].element_size()
    # torch hands them on by place, whatever the caller did.
    maxima = args[7] if len(args) > 7 else options.get("absmax_8bit")
    if maxima is not None:
        inside += 4 * maxima.numel()
    return int(inside)


def _grouped_shape(a: torch.Tensor, b: torch.Tensor, groups: torch.Tensor) -> tuple[int, ...]:
    """Shape of a grouped product: groups of rows with one matrix each, or of columns summed over."""
    if a.ndim == 2 and b.ndim == 2:
        return (groups.numel(), a.shape[0], b.shape[1])
    if a.ndim == 3 and b.ndim == 2:
        return (a.shape[1], b.shape[1])
    return (*a.shape[:-1], b.shape[-1])
