"""Counting live bytes: births, deaths, names and moments, to the byte, and as torch's own tracker has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from halfbyte.plan.live import DEQUANTISED, LiveBytes
from halfbyte.train.measure import measure

CPU = torch.device("cpu")


@pytest.fixture
def live() -> LiveBytes:
    counted = LiveBytes()
    counted.enter("first", "a")
    return counted


def test_live_counts_birth_and_death_and_no_view_alias_or_write(live: LiveBytes) -> None:
    with FakeTensorMode(), live:
        one = torch.empty(100)
        assert live.total_bytes == 400
        two = one.view(10, 10)[3:].T
        three = one.detach()
        one.mul_(2)
        torch.add(three, 1, out=three)
        assert live.total_bytes == 400
        four = two + 1
        assert live.total_bytes == 400 + 280
        del one, three
        assert live.total_bytes == 400 + 280  # a view keeps the storage
        del two
        assert live.total_bytes == 280
        del four
    assert live.total_bytes == 0
    # While it was multiplied nothing else was there; the sum is the most.
    assert live.peaks["first"].total_bytes == 680
    assert live.largest_terms == Counter(a=680)


def test_live_counts_real_tensors_as_fake_ones(live: LiveBytes) -> None:
    with live:
        kept = torch.ones(7, dtype=torch.int16)
    assert live.total_bytes == kept.nbytes == 14


def test_live_holds_each_phase_s_highest_moment_and_what_it_was_made_of(live: LiveBytes) -> None:
    with FakeTensorMode(), live:
        kept = torch.empty(10)
        _ = torch.empty(50) + 1  # 200 more, and 200 more
        del _
        live.enter("second", "b")
        assert live.peaks["second"].total_bytes == 40  # what is there when it begins
        more = torch.empty(20)
        del kept
        live.enter("third", "c")
        live.enter("second", "b")
        again = torch.empty(5)
    assert live.peaks["first"].terms == Counter(a=440)
    assert live.peaks["first"].total_bytes == 440
    assert live.peaks["second"].terms == Counter(a=40, b=80)
    assert live.peaks["second"].total_bytes == 120
    assert live.peaks["third"].total_bytes == 80
    assert live.total_bytes == more.nbytes + again.nbytes == 100


def test_live_moves_a_storage_to_another_name_for_good(live: LiveBytes) -> None:
    with FakeTensorMode(), live:
        kept, other = torch.empty(10), torch.empty(1)
        live.move(kept.view(2, 5), "gradients")
        assert (live.terms["a"], live.terms["gradients"], live.total_bytes) == (4, 40, 44)
        live.enter("second", "b")
        assert +live.peaks["second"].terms == Counter(a=4, gradients=40)
        del kept
        assert live.terms["gradients"] == 0
        assert live.largest_terms["gradients"] == 40
    with FakeTensorMode():
        live.move(torch.empty(3), "gradients")  # born outside: counted nowhere
    assert live.total_bytes == other.nbytes


def test_live_never_counts_what_is_ignored_or_was_there_before() -> None:
    live = LiveBytes()
    with FakeTensorMode():
        weight, outside = torch.empty(10, 10), torch.empty(3)
        with live:
            live.ignore(weight)
            live.enter("first", "a")
            views = weight[0], weight.detach()
            assert live.total_bytes == 0
            copy = weight.clone()
            assert live.total_bytes == copy.nbytes == 400
            del views
    assert outside.nbytes == 12


def test_live_counts_what_comes_after_an_ignored_tensor_is_gone(live: LiveBytes) -> None:
    with FakeTensorMode():
        gone = [torch.empty(5) for _ in range(50)]
        with live:
            for tensor in gone:
                live.ignore(tensor)
            del tensor
            gone.clear()
            kept = [torch.empty(5) for _ in range(50)]
    assert live.total_bytes == 20 * len(kept)


def test_live_counts_a_reused_address_anew(live: LiveBytes) -> None:
    with FakeTensorMode(), live:
        for size in (3, 1, 2):
            one = torch.empty(size)
            assert live.total_bytes == 4 * size
            del one
    assert live.peaks["first"].total_bytes == 12


def test_live_answers_questions_about_values_with_one(live: LiveBytes) -> None:
    with FakeTensorMode(), live:
        assert torch.zeros(()).item() == 1
        assert bool((torch.zeros(4) > 0).all())


def sequential() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.Softmax(-1), nn.Linear(256, 8)
    )
    return model, torch.zeros(128, 64)


def language() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.Dropout(0.1), nn.Linear(64, 50)
    )  # fmt: skip
    return model, torch.zeros(4, 16, dtype=torch.long)


@pytest.mark.parametrize("make", [sequential, language])
def test_live_peak_is_that_of_torch_s_own_tracker(
    live: LiveBytes, make: Callable[[], tuple[nn.Module, torch.Tensor]]
) -> None:
    def step() -> None:
        model(inputs).square().sum().backward()

    with FakeTensorMode():
        model, inputs = make()
        theirs: Any = MemTracker()
        theirs.track_external(model, inputs)
        with theirs:
            step()
        model.zero_grad()
        fixed = [*model.parameters(), inputs]
        with live:
            for tensor in fixed:
                live.ignore(tensor)
            step()
    peak = theirs.get_tracker_snapshot("peak")[CPU]["Total"]
    assert live.peaks["first"].total_bytes + sum(tensor.nbytes for tensor in fixed) == peak


@pytest.mark.parametrize("double_quant", [True, False])
def test_live_counts_what_a_4_bit_product_takes_inside(live: LiveBytes, double_quant: bool) -> None:
    """The unpacked weight, and the block maxima where they are quantised; measured on the real kernel."""
    layer = Linear4bit(
        512, 256, bias=False, compute_dtype=torch.float32, compress_statistics=double_quant,
        quant_type="nf4",
    ).to(CPU)  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    inputs = torch.randn(4, 512)
    with torch.no_grad():
        layer(inputs)  # the first call looks at shapes
        measured = measure(CPU, lambda: layer(inputs))
        with live:
            live.ignore(layer.weight)
            layer(inputs)
    inside = 512 * 256 * 4 + (512 * 256 // 64 * 4 if double_quant else 0)
    peak = live.peaks["first"]
    assert +peak.terms == Counter({DEQUANTISED: inside, "a": 4 * 256 * 4})
    assert live.largest_terms[DEQUANTISED] == inside
    assert peak.total_bytes == measured.forward_bytes - measured.start_bytes


def test_live_counts_an_unpacked_weight_by_its_own_name(live: LiveBytes) -> None:
    layer = Linear4bit(512, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(CPU)
    layer.support_avx512bf16_for_cpu = False
    inputs = torch.randn(4, 512, requires_grad=True)
    out, slope = layer(inputs), torch.ones(4, 256)

    def backward(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, inputs, slope, retain_graph=True)

    with live:
        live.ignore(layer.weight)
        backward(out)
    # Its maxima go before the product; the result comes on top.
    assert +live.peaks["first"].terms == Counter({DEQUANTISED: 512 * 256 * 4, "a": inputs.nbytes})
    measured = measure(CPU, lambda: out, backward)
    assert live.peaks["first"].total_bytes == measured.backward_bytes - measured.start_bytes
