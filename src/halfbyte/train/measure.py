"""Owns the measurement of memory: exact bytes of live tensors during a forward and a backward pass."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from halfbyte.plan.live import StorageCounter

FORWARD, BACKWARD = "halfbyte.forward", "halfbyte.backward"


@dataclass(frozen=True)
class Measured:
    """Bytes of live tensors on one device.

    Attributes:
        start_bytes: bytes before the forward pass.
        forward_bytes: peak during the forward pass.
        kept_bytes: bytes above ``start_bytes`` that the forward pass keeps for the backward pass.
        backward_bytes: peak during the backward pass.
        end_bytes: bytes after the backward pass.
    """

    start_bytes: int
    forward_bytes: int
    kept_bytes: int
    backward_bytes: int
    end_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The peak over both passes, in bytes of live tensors."""
        return max(self.forward_bytes, self.backward_bytes)


def measure(
    device: torch.device,
    forward: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], None] | None = None,
    *,
    profiled: bool = True,
) -> Measured:
    """Run a forward pass and then a backward pass on its result, and count bytes of live tensors.

    On CUDA the figures come from ``torch.cuda``. On the CPU PyTorch's profiler reports every
    allocation: the sizes of tensors and of temporaries inside kernels, independent of the C library's
    heap. Memory that existed before and is freed during the passes still counts as live. The profiler
    itself takes hundreds of megabytes; without it (``profiled`` is false) tensors are counted as they
    are created and freed, and temporaries inside kernels are missed.
    """
    then = backward or (lambda _: None)
    if device.type == "cuda":
        return _on_cuda(device, forward, then)
    return _on_cpu(device, forward, then) if profiled else _by_birth(device, forward, then)


def live_tensor_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors that Python can reach, counting each storage once."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    gc.collect()
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inspecting objects can load deprecated modules
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    for tensor in found:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is None or part.layout != torch.strided:
                continue
            storage = part.untyped_storage()
            if storage.device.type == "cpu":  # a fake tensor's storage is on no device
                sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _on_cuda(
    device: torch.device,
    forward: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
) -> Measured:
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = forward()
    torch.cuda.synchronize(device)
    most, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    backward(result)
    del result
    torch.cuda.synchronize(device)
    return Measured(
        start,
        most,
        kept - start,
        torch.cuda.max_memory_allocated(device),
        torch.cuda.memory_allocated(device),
    )


def _on_cpu(
    device: torch.device,
    forward: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
) -> Measured:
    from torch.profiler import ProfilerActivity, profile, record_function

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs its start and stop
    start = live_tensor_bytes(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function(FORWARD):
            result = forward()
        with record_function(BACKWARD):
            backward(result)
        del result
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    border = next(event.start_ns() for event in events if event.name() == BACKWARD)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most_before = most_after = kept = 0
    for time_ns, size in changes:
        now += size
        if time_ns < border:
            kept, most_before = now, max(most_before, now)
        else:
            most_after = max(most_after, now)
    return Measured(start, start + most_before, kept, start + max(most_after, kept), start + now)


def _by_birth(
    device: torch.device,
    forward: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
) -> Measured:
    start = live_tensor_bytes(device)
    births = StorageCounter()
    with births:
        result = forward()
        forward_bytes, kept_bytes = births.peak_bytes, births.total_bytes
        births.peak_bytes = kept_bytes
        backward(result)
    del result
    return Measured(
        start,
        start + forward_bytes,
        kept_bytes,
        start + births.peak_bytes,
        start + births.total_bytes,
    )


def memory_bytes(device: torch.device) -> int:
    """Return the peak bytes so far: allocated on CUDA, resident in this process on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_bytes()


def resident_bytes() -> int:
    """Return the peak resident size of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
