"""Owns counting what one training step launches, of halfbyte or of TRL, on the CPU as it would be on CUDA.

python -m benchmarks.peers.counted JOB.json halfbyte|trl [SHARE]

Operators are those that PyTorch dispatches between the ends of two steps, of which the second is not logged; views and
allocations launch nothing and are left out. An operator of halfbyte's own kernels counts once: it is one
launch on CUDA, whatever its twin does on the CPU. SHARE is that of the tiny vocabulary in a real one: the loss
takes as many blocks as there.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from transformers import TrainerCallback, TrainerState

from benchmarks.peers import halfbyte, trl
from benchmarks.peers.job import read_job
from halfbyte.forward import loss
from halfbyte.kernels.library import OPERATORS

COUNTED_STEP = 2  # operators are counted in the step after this one; the others are timed
# What launches nothing, beside views: allocations, and what is looked up on the host.
FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
    "sym_size",
    "is_same_size",
    "set_",
    "_unsafe_view",
    "resize_",
    "_reshape_alias",
    "stride",
}
# What makes the host wait for the device.
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}
MAKERS = ("tensor", "as_tensor", "from_numpy")
# Matrix products, of which CUDA's are launches: on a CPU each takes longer than the host takes to call it.
PRODUCTS = ("mm", "mm.out", "addmm", "addmm_", "addmm.out", "bmm", "bmm.out", "baddbmm", "baddbmm_")


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators by phase of the step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "step"
        self.found: dict[str, Counter[str]] = {"step": Counter(), "backward": Counter()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count an operator and run it."""
        name = func.name().split("::")[1].split(".")[0]
        self.found[self.phase]["syncs"] += name in SYNCS
        self.found[self.phase]["index_put"] += name.startswith(("index_put", "_index_put"))
        if not _is_free(func, name):
            self.found[self.phase][func.name()] += 1
        return func(*args, **(kwargs or {}))


def _is_free(func: Any, name: str) -> bool:
    returned = func._schema.returns
    views = [r.alias_info is not None and not r.alias_info.is_write for r in returned]
    return name in FREE or (bool(views) and all(views))


class StepCount(TrainerCallback):
    """Counts one step, and times those after it in seconds of the process."""

    def __init__(self) -> None:
        self.operators: Operators | None = None
        self.counts: dict[str, Any] = {}
        self.list_tensors = self.nodes = self.logging_steps = 0
        self.collating = self.in_twin = False
        self.makers = {name: getattr(torch, name) for name in MAKERS}
        self.ends: list[float] = []
        self.twins_s = 0.0
        self.products: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Begin or end the count."""
        if state.global_step == COUNTED_STEP - 1:  # a step is logged after this
            self.logging_steps, state.logging_steps = state.logging_steps, sys.maxsize
        if self.operators is not None:
            for name, maker in self.makers.items():
                setattr(torch, name, maker)
            state.logging_steps = self.logging_steps
            self.stand_in()
            self.operators.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._keep(self.operators.found)
            self.operators = None
        elif state.global_step == COUNTED_STEP:
            for name in MAKERS:  # not before: models are loaded with them
                _wrap(torch, name, self._made)
            self.operators = Operators()
            self.operators.__enter__()  # type: ignore[no-untyped-call]
        if state.global_step > COUNTED_STEP:
            self.ends.append(time.process_time() - self.twins_s)

    def _keep(self, found: dict[str, Counter[str]]) -> None:
        total = found["step"] + found["backward"]
        marks = {name: total.pop(name, 0) for name in ("syncs", "index_put")}
        self.counts = {
            "launches": sum(total.values()),
            "autograd_nodes": self.nodes,
            "list_tensors": self.list_tensors,
            "syncs": marks["syncs"],
            "index_put_backward": found["backward"]["index_put"],
            "operators": dict(total.most_common()),
        }

    def watch(self) -> None:
        """Wrap what is to be counted beside operators, for the rest of the process."""
        _wrap(Accelerator, "backward", self._backward)
        _wrap(_MapDatasetFetcher, "fetch", self._collate)
        for name in ("tolist", "numpy"):
            _wrap(torch.Tensor, name, self._read)

        for one in OPERATORS.values():
            _wrap(one, "twin", self._twin)

    def stand_in(self) -> None:
        """Let twins and products give zeros from now on: what they take would hide what the host takes."""
        for name, one in OPERATORS.items():
            if name != "softmax_block":  # whose zeros would be infinite losses
                one.twin = functools.partial(self._twin, functools.partial(_zeros, one.shapes))
        for name in PRODUCTS:
            product = functools.partial(_no_product, name)
            self.products.impl(name, functools.partial(self._twin, product), "CPU")

    def _twin(self, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """The twin, or a matrix product, stands for a launch, whose own time is not the caller's.

        By the clock on the wall: that of the process may take longer to read than a twin takes.
        """
        began, self.in_twin = time.perf_counter(), True
        try:
            return call(*given, **options)
        finally:
            self.in_twin = False
            self.twins_s += time.perf_counter() - began

    def _backward(self, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        if self.operators is None:
            return call(*given, **options)
        self.nodes = _num_nodes(given[1])
        self.operators.phase = "backward"
        try:
            return call(*given, **options)
        finally:
            self.operators.phase = "step"

    def _collate(self, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Batches are made by the loader, on the host, and pinned."""
        self.collating = True
        try:
            return call(*given, **options)
        finally:
            self.collating = self.in_twin = False

    def _made(self, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        is_known = self.collating or self.in_twin or isinstance(given[0], torch.Tensor)
        self.list_tensors += not is_known
        return call(*given, **options)

    def _read(self, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        if self.operators is not None and not self.collating and not self.in_twin:
            self.operators.found[self.operators.phase]["syncs"] += 1
        return call(*given, **options)

    def write(self, path: Path) -> None:
        """Leave the counts, and the median of the timed steps."""
        seconds = [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)]
        path.write_text(json.dumps(self.counts | {"host_s": statistics.median(seconds)}))


def _zeros(shapes: Callable[..., Any], *given: Any) -> Any:
    result = shapes(*given)
    for one in result if isinstance(result, tuple) else (result,):
        if one is not None:
            one.zero_()
    return result


def _no_product(name: str, *given: torch.Tensor, **options: Any) -> torch.Tensor:
    """Zeros of a product's shape, or the tensor that it would have been written to."""
    if name.endswith("_"):
        return given[0]
    if "out" in options:
        return options["out"]  # type: ignore[no-any-return]
    a, b = given[-2:]
    return a.new_zeros((*a.shape[:-1], b.shape[-1]))


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    call = getattr(owner, name)
    setattr(owner, name, lambda *given, **options: around(call, *given, **options))


def _num_nodes(loss: torch.Tensor) -> int:
    known, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in known:
            known.add(node)
            todo += [before for before, _ in node.next_functions]
    return len(known)


def main() -> None:
    """Train with a tool and leave ``counts.json``."""
    job = read_job()
    torch.set_num_threads(1)
    count = StepCount()
    count.watch()
    if len(sys.argv) > 3:
        loss.BLOCK_BYTES["cuda"] = int(loss.BLOCK_BYTES["cuda"] * float(sys.argv[3]))
    {"halfbyte": halfbyte.main, "trl": trl.main}[sys.argv[2]](job, count)
    count.write(Path(job.out) / "counts.json")


if __name__ == "__main__":
    main()
