"""Owns the exact count of live tensor bytes, operation by operation, also on tensors without data."""

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
UNPACKING = {"bitsandbytes::dequantize_4bit", "halfbyte::unpack_4bit"}


@dataclass
class Peak:
    """Holds the largest sum of live bytes in one phase, and its parts by term."""

    total_bytes: int = 0
    terms: Counter[str] = field(default_factory=Counter)


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors created inside, from their creation until they are freed.

    Attributes:
        total_bytes: bytes that are live now.
        peak_bytes: the most bytes that were live at once; callers may reset it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total_bytes = self.peak_bytes = 0
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(out, {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))})
        return out

    def _count(self, out: Any, known: set[int]) -> None:
        """Count the new storages of a result; ``known`` are storages that existed before."""
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive and key not in known:
                freed = functools.partial(self._freed, key)
                self._alive[key] = storage.nbytes(), weakref.ref(storage, freed)
                self._grow(key, storage.nbytes())

    def _freed(self, key: int, _: Any) -> None:
        self._shrink(key, self._alive.pop(key)[0])

    def _grow(self, key: int, size: int) -> None:
        self.total_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)

    def _shrink(self, key: int, size: int) -> None:
        self.total_bytes -= size


class LiveBytes(StorageCounter):  # type: ignore[no-untyped-call]
    """Counts live bytes by term and by phase.

    A storage counts under the ``term`` that is set when it is created. Tensors given to ``ignore``
    (weights, optimizer states) are counted elsewhere. Fake tensors, which have sizes but no memory, are
    counted too, so that a step of any model is counted in a second.

    A value read from a fake tensor, which has none, is 1: models check whether rows are unpadded and
    unpacked, and ours are.

    Attributes:
        peaks: for each phase the moment with the most live bytes.
        terms: bytes of each term that are live now.
        largest_terms: the most bytes of each term by itself, at any time.
        kept_bytes: what the forward pass keeps for the backward pass; set by the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.term = ""
        self.peaks: dict[str, Peak] = {}
        self.terms: Counter[str] = Counter()
        self.largest_terms: Counter[str] = Counter()
        self.kept_bytes = 0
        self._ignored: set[int] = set()
        self._ignored_storages: list[Any] = []
        self._term_of: dict[int, str] = {}
        self._new_term = ""

    def enter(self, phase: str, term: str) -> None:
        """Count what happens from now on in ``phase``, and new storages under ``term``."""
        self.phase, self.term = phase, term
        self.peaks.setdefault(phase, Peak())
        self._update_peak()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this tensor's storage."""
        storage = tensor.untyped_storage()
        self._ignored_storages.append(storage)  # so that no other storage takes its address
        self._ignored.add(storage._cdata)

    def move(self, tensor: torch.Tensor, term: str) -> None:
        """Count this tensor's storage under another term from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            size, _ = self._alive[key]
            self.terms[self._term_of[key]] -= size
            self._add(key, size, term)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        name = func.name()
        if func is torch.ops.aten._grouped_mm.default:
            # Its shape function accepts only bf16; its kernels accept other dtypes too (torch 2.13).
            out = args[0].new_empty(_grouped_shape(*args[:3]))
        else:
            out = func(*args, **options)
        inside_bytes = 0
        self._new_term = DEQUANTISED if name in UNPACKING else self.term
        if name == "bitsandbytes::gemm_4bit":
            inside_bytes = _gemm_inside_bytes(args, options)
        self._count(out, self._ignored)
        if inside_bytes:
            dequantised = self.terms[DEQUANTISED] + inside_bytes
            self.largest_terms[DEQUANTISED] = max(self.largest_terms[DEQUANTISED], dequantised)
            self._update_peak(inside_bytes)
        return out

    def _grow(self, key: int, size: int) -> None:
        self._add(key, size, self._new_term)
        super()._grow(key, size)
        self._update_peak()

    def _shrink(self, key: int, size: int) -> None:
        self.terms[self._term_of.pop(key)] -= size
        super()._shrink(key, size)

    def _add(self, key: int, size: int, term: str) -> None:
        self._term_of[key] = term
        self.terms[term] += size
        self.largest_terms[term] = max(self.largest_terms[term], self.terms[term])

    def _update_peak(self, inside_bytes: int = 0) -> None:
        peak = self.peaks[self.phase]
        if self.total_bytes + inside_bytes > peak.total_bytes:
            peak.total_bytes = self.total_bytes + inside_bytes
            peak.terms = Counter(self.terms)
            if inside_bytes:
                peak.terms[DEQUANTISED] += inside_bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _gemm_inside_bytes(args: Any, options: dict[str, Any]) -> int:
    """Return what bitsandbytes 0.50 takes inside a 4-bit product: the weight and its block maxima."""
    num_weights = args[2][0] * args[2][1]
    inside_bytes = num_weights * args[0].element_size()
    # torch passes them on as positional arguments, whatever the caller did.
    maxima = args[7] if len(args) > 7 else options.get("absmax_8bit")
    if maxima is not None:
        inside_bytes += 4 * maxima.numel()
    return int(inside_bytes)


def _grouped_shape(a: torch.Tensor, b: torch.Tensor, groups: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a grouped product: groups of rows with a matrix each, or of columns to sum over."""
    if a.ndim == 2 and b.ndim == 2:
        return (groups.numel(), a.shape[0], b.shape[1])
    if a.ndim == 3 and b.ndim == 2:
        return (a.shape[1], b.shape[1])
    return (*a.shape[:-1], b.shape[-1])
