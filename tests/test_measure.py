"""Counting live bytes: exactly, on the CPU at every allocation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte.train.measure import live_tensor_bytes, measure, resident_bytes

CPU, MB = torch.device("cpu"), 1 << 20


def mb(size: int) -> torch.Tensor:
    return torch.zeros(size * MB, dtype=torch.uint8)


@pytest.mark.parametrize("profiled", [True, False])
def test_measure_counts_what_lives_in_each_pass(profiled: bool) -> None:
    kept: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        kept.append(mb(3))
        passing = mb(5)
        del passing
        return mb(1)

    def backward(result: torch.Tensor) -> None:
        both = [mb(7), mb(2)]
        kept.pop()
        del both

    found = measure(CPU, forward, backward, profiled=profiled)
    assert found.forward_bytes - found.start_bytes == 8 * MB
    assert found.kept_bytes == 4 * MB
    assert found.backward_bytes - found.start_bytes == 13 * MB
    assert found.end_bytes == found.start_bytes
    assert found.peak_bytes == found.backward_bytes


def test_measure_sees_temporaries_inside_an_operation() -> None:
    x = torch.zeros(256, 1024)
    found = measure(CPU, lambda: torch.nn.functional.layer_norm(x, (1024,)))
    # The result and, never seen by Python, a mean and a deviation for each row.
    assert found.forward_bytes - found.start_bytes == x.nbytes + 2 * 256 * 4


@pytest.mark.parametrize("profiled", [True, False])
def test_measure_counts_gradients_of_a_real_backward(profiled: bool) -> None:
    weight = torch.zeros(MB // 4, requires_grad=True)
    found = measure(CPU, lambda: (weight * 2).sum(), torch.autograd.backward, profiled=profiled)
    assert found.end_bytes - found.start_bytes == MB
    assert weight.grad is not None


def test_live_bytes_count_shared_storage_once_and_gradients() -> None:
    before = live_tensor_bytes(CPU)
    whole = torch.zeros(MB, requires_grad=True)
    part = whole.detach()[: MB // 2]
    assert live_tensor_bytes(CPU) - before == 4 * MB
    whole.grad = torch.zeros(MB)
    assert live_tensor_bytes(CPU) - before == 8 * MB
    del whole, part


def test_live_bytes_leave_out_tensors_without_data() -> None:
    before = live_tensor_bytes(CPU)
    with FakeTensorMode():
        fake = torch.zeros(1 << 30)
    bare = torch.zeros(1 << 30, device="meta")
    assert live_tensor_bytes(CPU) == before
    del fake, bare


def test_resident_size_is_that_of_this_process() -> None:
    psutil = pytest.importorskip("psutil")
    assert resident_bytes() >= 0.9 * psutil.Process().memory_info().rss
