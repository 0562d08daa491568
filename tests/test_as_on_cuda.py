"""The pass as on CUDA, by the operators' twins: the same loss and gradients as the plain padded computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_packed import NONE, ROWS, assert_same, build, outcome
from test_prefix_tree import row_sets
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.tiny import KINDS, tiny_model
from halfbyte.config.schema import Speed
from halfbyte.data.prefix_tree import lay_out
from halfbyte.forward.fuse import KEPT_LAYERS, plain_lines
from halfbyte.forward.fused_attention import FusedAttention
from halfbyte.forward.packed_layout import PackedLayout
from halfbyte.kernels.operators import use_kernels
from halfbyte.model.adapter import trainable_parameters

NEW = ("varlen_attention", "kernels", "flat_adapter")


@pytest.fixture(params=["7.5", "9.0"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HALFBYTE_CAPABILITY", request.param)
    return str(request.param)


class Called(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name().startswith("halfbyte::"):
            self.names.add(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def plain_outcome(folder: Path, tmp_path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HALFBYTE_CAPABILITY", raising=False)
        return outcome(build(folder, NONE, tmp_path), ROWS, NONE)


@pytest.mark.parametrize("off", ["", *NEW, "share_prefixes", "fused_layers", "fused_lora"])
@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_gemma_vision"])
def test_loss_and_gradients_are_the_plain_ones(
    model_name: str, off: str, card: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Ragged rows with nested prefixes; Gemma's sliding window of 16 is shorter than they are."""
    folder = request.getfixturevalue(model_name)
    speed = Speed(**{off: False}) if off else Speed()
    wanted = plain_outcome(folder, tmp_path)
    use_kernels(speed.kernels)
    try:
        model = build(folder, speed, tmp_path, varlen=speed.varlen_attention)
        with Called() as called:
            assert_same(outcome(model, ROWS, speed), wanted)
    finally:
        use_kernels(True)
    assert ("varlen" in called.names) == (off != "varlen_attention")
    assert ("unpack_4bit" in called.names) == (off not in ("kernels", "fused_lora"))
    assert ("rms_norm" in called.names) == (off not in ("kernels", "fused_layers"))
    whole = not off or off in ("flat_adapter", "share_prefixes")
    assert ("norm_rope" in called.names) == whole
    assert ("sum_copies" in called.names) == (
        off not in ("kernels", "varlen_attention", "share_prefixes")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_takes_the_whole_path(kind: str, card: str, tmp_path: Path) -> None:
    folder = tiny_model(kind, 2, tmp_path)
    wanted = plain_outcome(folder, tmp_path)
    model = build(folder, Speed(), tmp_path)
    layers = [m for m in model.modules() if isinstance(getattr(m, "forward", None).__class__, type)]
    fused = [
        m
        for m in layers
        if getattr(getattr(m, "forward", None), "func", None) is FusedAttention.forward
    ]
    assert len(fused) == 2
    assert_same(outcome(model, ROWS, Speed()), wanted)


def test_attention_that_the_probe_refuses_is_computed_plainly_and_said(
    card: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.forward.fused_attention._proven", lambda candidate: None)
    model = build(tiny_llama, Speed(), tmp_path)
    assert plain_lines(model, Speed(), torch.device("cpu")) == [
        f"2 of 2 attention layers are not fused: {KEPT_LAYERS}"
    ]
    assert_same(outcome(model, ROWS, Speed()), plain_outcome(tiny_llama, tmp_path))


@given(rows=row_sets())
@settings(max_examples=20, deadline=None)
def test_any_rows_give_the_plain_losses(rows: Any, tiny_llama_on_cuda: Any) -> None:
    plain, ours = tiny_llama_on_cuda
    losses = [
        model(layout=lay_out(rows, share=share)) for model, share in ((plain, False), (ours, True))
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_llama_on_cuda(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("scratch")
    plain = build(tiny_llama, NONE, scratch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CAPABILITY", "9.0")
        yield plain, build(tiny_llama, Speed(), scratch)


def test_the_adapter_lies_in_one_block_and_stays_pefts(
    tiny_llama: Path, card: str, tmp_path: Path
) -> None:
    model = build(tiny_llama, Speed(), tmp_path)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    first = outcome(model, ROWS, Speed())
    after = trainable_parameters(model)
    assert all(torch.equal(after[name], one) for name, one in before.items())
    storages = {p.untyped_storage().data_ptr() for p in after.values()}
    assert len(storages) == 1
    # An optimizer changes the parameters in place: the next pass reads what they are then.
    with torch.no_grad():
        for parameter in after.values():
            parameter.mul_(2)
    second = outcome(model, ROWS, Speed())
    assert second[0] != pytest.approx(first[0], rel=1e-6)
    with torch.no_grad():
        for parameter in after.values():
            parameter.div_(2)
    assert outcome(model, ROWS, Speed())[0] == first[0]
    # Something replaces them: they are laid side by side again.
    for parameter in after.values():
        parameter.data = parameter.data.clone()
    assert outcome(model, ROWS, Speed())[0] == first[0]


def test_a_packed_layout_is_one_tensor() -> None:
    layout = lay_out(ROWS, share=True, weights=[0.5, 2.0, 1.0, 3.0], groups=[0, 1, 0, 1])
    packed = PackedLayout.of(layout, varlen=True, num_groups=2)
    assert packed.numbers.dtype == torch.int32
    assert packed["ids"].tolist() == layout.ids
    assert packed["counts"].tolist() == list(layout.counts)
    assert packed["shares"].tolist() == layout.counts_of_groups(2)
    assert packed["query_starts"].tolist() == [0, *(node.end for node in layout.nodes)]
    rows, starts, places = (packed[n].tolist() for n in ("key_rows", "copy_starts", "copy_places"))
    for token in range(len(layout.ids)):
        assert {rows[place] for place in places[starts[token] : starts[token + 1]]} <= {token}
    assert sorted(places) == list(range(len(rows)))
    moved = packed.to("cpu", non_blocking=True)
    assert torch.equal(moved.numbers, packed.numbers)
    alone = PackedLayout.of(lay_out(ROWS, share=False), varlen=True)
    assert "key_rows" not in alone
