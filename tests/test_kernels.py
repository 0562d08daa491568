"""Our operators: each twin is the formula it says, and each kernel is its twin and compiles for every card."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks import kernels
from halfbyte.config.schema import Speed
from halfbyte.errors import ModelError
from halfbyte.forward import fuse
from halfbyte.kernels import gates, norms, operators, products, rotary, softmax, unpack, varlen
from halfbyte.kernels.capability import capability_of, planned_for
from halfbyte.kernels.library import OPERATORS
from halfbyte.kernels.operators import (
    launched,
    mm_fp32,
    operator,
    triton_refusal,
    use_kernels,
    uses_operators,
)

CPU = torch.device("cpu")


def gradients(
    formula: Callable[..., torch.Tensor], dy: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of a formula, by autograd."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    return torch.autograd.grad(formula(*leaves), leaves, dy)


# --- formulas ---


def test_norm_and_its_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    x, dy, weight = torch.randn(2, 3, 40), torch.randn(2, 3, 40), torch.randn(40)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (40,), weight, 1e-3)

    torch.testing.assert_close(norms.rms_norm(x, weight, 1e-3), plain(x))
    torch.testing.assert_close(norms.rms_norm(x, weight, 1e-3, dy), plain(x) + dy)
    (wanted,) = gradients(plain, dy, x)
    torch.testing.assert_close(norms.rms_norm_backward(dy, x, weight, 1e-3), wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_its_gradients_are_those_of_autograd(activation: str) -> None:
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, 20), torch.randn(3, 20), torch.randn(3, 20)

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if activation == "silu":
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh") * up

    torch.testing.assert_close(gates.glu(gate, up, activation), plain(gate, up))
    found = gates.glu_backward(dy, gate, up, activation)
    for one, wanted in zip(found, gradients(plain, dy, gate, up), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.parametrize("is_normed", [True, False])
def test_rotation_and_its_gradient_are_those_of_transformers(is_normed: bool) -> None:
    from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

    torch.manual_seed(0)
    x, dy, cos, sin = (torch.randn(*shape) for shape in ((5, 3, 16), (5, 3, 16), (5, 16), (5, 16)))
    weight = torch.randn(16) if is_normed else None

    def plain(x: torch.Tensor) -> torch.Tensor:
        normed = x if weight is None else functional.rms_norm(x, (16,), weight, 1e-6)
        heads = normed.transpose(0, 1)[None]  # (1, H, T, D)
        rotated, _ = apply_rotary_pos_emb(heads, heads, cos[None], sin[None])
        back: torch.Tensor = rotated[0].transpose(0, 1)
        return back

    torch.testing.assert_close(rotary.norm_rope(x, cos, sin, weight, 1e-6), plain(x))
    (wanted,) = gradients(plain, dy, x)
    found = rotary.norm_rope_backward(dy, x, cos, sin, weight, 1e-6)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_unpacked_weights_are_those_of_bitsandbytes(
    dtype: torch.dtype, double_quant: bool, kind: str
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    for shape in ((64, 128), (3, 50), (300, 192)):
        codes, state = quantize_4bit(
            torch.randn(shape), blocksize=64, quant_type=kind, compress_statistics=double_quant
        )
        state.dtype = dtype
        nested = state.state2
        parts: Any = (nested.code, nested.absmax, state.offset) if nested else (None, None, None)
        found = unpack.unpack_4bit(
            codes,
            state.absmax,
            state.code,
            parts[0],
            parts[1],
            parts[2],
            64,
            list(shape),
            dtype,
        )
        torch.testing.assert_close(found, dequantize_4bit(codes, state))


@pytest.mark.parametrize("window", [0, 3, 100])
@pytest.mark.parametrize("card", [(7, 5), (9, 0)])
def test_attention_over_sequences_is_that_of_pytorch(window: int, card: tuple[int, int]) -> None:
    torch.manual_seed(0)
    queries, keys = [4, 1, 6], [4, 7, 9]
    q, dy = torch.randn(11, 4, 8), torch.randn(11, 4, 8)
    k, v = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    starts = [
        torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        for sizes in (queries, keys)
    ]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = []
        for i, j in zip(
            itertools.pairwise(starts[0].tolist()),
            itertools.pairwise(starts[1].tolist()),
            strict=True,
        ):
            rows: Any = [x[slice(*n)].transpose(0, 1)[None] for x, n in ((q, i), (k, j), (v, j))]
            length, total = rows[0].shape[2], rows[1].shape[2]
            distance = torch.arange(total - length, total)[:, None] - torch.arange(total)
            seen = (distance >= 0) & (distance < (window or total))
            out = functional.scaled_dot_product_attention(
                rows[0], rows[1], rows[2], attn_mask=seen, scale=0.3, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    with planned_for(card):
        given: Any = (*starts, [6, 9], window, 0.3)
        output, *rest = varlen.varlen(q, k, v, *given)
        torch.testing.assert_close(output, plain(q, k, v))
        found = varlen.varlen_backward(dy, q, k, v, [output, *rest], *given)
    for one, wanted in zip(found, gradients(plain, dy, q, k, v), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_softmax_of_blocks_is_that_of_all_logits(softcap: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 90) * 6, torch.tensor([0, 89, 40, 41, 7], dtype=torch.int32)
    running = torch.zeros(4, 5)
    running[0] = -torch.inf
    sums = torch.zeros(5, 90)
    for first in range(0, 90, 41):
        block = logits[:, first : first + 41].clone()
        p = softmax.softmax_block(block, labels, first, running, softcap, torch.float32)
        sums *= running[3, :, None]
        sums[:, first : first + 41] = p
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    slope = 1 - (z / softcap) ** 2 if softcap else 1.0
    losses = running[1].log() + running[0] - running[2]
    torch.testing.assert_close(losses, functional.cross_entropy(z, labels.long(), reduction="none"))
    torch.testing.assert_close(sums / running[1, :, None], z.softmax(dim=1) * slope)
    assert (losses >= 0).all()


def test_copies_are_added_up_in_fp32() -> None:
    copies = torch.tensor([[1.0], [256.0], [1.0], [1.0]]).bfloat16()
    starts, places = (torch.tensor(n, dtype=torch.int32) for n in ([0, 4, 4], [1, 0, 2, 3]))
    total = products.sum_copies(copies, starts, places)
    assert total.tolist() == [[260.0], [0.0]]  # in bf16, 256 + 1 is 256


# --- which is called ---


def test_operators_are_called_as_on_a_card_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not uses_operators(CPU)
    assert operator("glu", CPU) is gates.glu
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "7.5")
    assert capability_of(CPU) == (7, 5)
    assert launched("glu", CPU) is gates.glu
    with FakeTensorMode():  # a mode sees our operators, each as one
        assert launched("glu", CPU) is torch.ops.halfbyte.glu.default
    try:
        use_kernels(False)
        assert launched("glu", CPU) is None
        assert launched("varlen", CPU) is not None  # one operator of PyTorch
    finally:
        use_kernels(True)
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "7.0")
    assert not uses_operators(CPU)
    monkeypatch.delenv("HALFBYTE_CAPABILITY")
    with planned_for((8, 0)):
        assert uses_operators(CPU)
        assert launched("glu", CPU) is torch.ops.halfbyte.glu.default


def test_why_triton_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as where there is no C compiler (ml-cross-entropy issue 5, unsloth issue 1772)."""
    cuda, ones, find_spec = torch.device("cuda"), torch.ones, importlib.util.find_spec
    refusal = "Failed to find C compiler. Please specify via CC environment variable."

    def no_compiler(*_: Any) -> None:
        raise RuntimeError(refusal)

    monkeypatch.setattr(torch, "ones", lambda shape, device: ones(shape))
    monkeypatch.setattr(operators, "_launch", lambda name: no_compiler)
    monkeypatch.setattr(operators, "triton_refusal", triton_refusal.__wrapped__)
    monkeypatch.setattr(fuse, "triton_refusal", triton_refusal.__wrapped__)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "triton" or find_spec(name)
    )
    with planned_for((7, 5)):
        assert launched("glu", cuda) is None
        assert launched("varlen", cuda) is not None
        lines = fuse.plain_lines(torch.nn.Linear(1, 1), Speed(), cuda)
    assert lines == [
        f"PyTorch's operators compute in place of Triton's kernels: RuntimeError: {refusal}"
    ]


@pytest.mark.parametrize("text", ["8", "8.x", "sm80", "8.0.1", "-8.0"])
def test_what_is_no_capability_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CAPABILITY", text)
    with pytest.raises(ModelError, match=r"allowed: a compute capability such as 7\.5"):
        capability_of(CPU)


def test_every_operator_is_registered_with_its_shapes() -> None:
    """On tensors without data each gives what its twin gives on real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def outline(result: Any) -> list[tuple[Any, ...]]:
        parts = result if isinstance(result, tuple) else (result,)
        return [(one.shape, one.dtype) for one in parts]

    for name, formula, given in kernels.cases(torch.bfloat16):
        wanted = formula(*(one.clone() if isinstance(one, torch.Tensor) else one for one in given))
        if name == "softmax_block":
            wanted = wanted[0]
        mode = FakeTensorMode()
        with mode:
            fakes = [
                mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in given
            ]
            assert outline(getattr(torch.ops.halfbyte, name)(*fakes)) == outline(wanted)
    assert set(OPERATORS) - {name for name, *_ in kernels.cases(torch.bfloat16)} == {
        "addmm_fp32_",
        "mm_fp32",
        "varlen",
        "varlen_backward",
    }


def test_products_stay_in_fp32_where_they_are_computed_as_on_cuda() -> None:
    a, b = torch.full((1, 2), 1.0).bfloat16(), torch.tensor([[256.0], [1.0]]).bfloat16()
    assert mm_fp32(a, b).tolist() == [[256.0]]  # rounded to bf16 on a CPU
    with planned_for((8, 0)):
        assert mm_fp32(a, b).tolist() == [[257.0]]
        assert mm_fp32(a, b, 0.5).tolist() == [[128.5]]


# --- kernels ---


def test_kernels_give_what_their_formulas_give() -> None:
    pytest.importorskip("triton")
    found = kernels.interpreted()
    assert set(found) == {name for name, *_ in kernels.cases(torch.float32)}
    assert [
        (name, dtype, gap)
        for name, gaps in found.items()
        for dtype, gap in gaps.items()
        if not gap <= kernels.BOUNDS[dtype]
    ] == []


def test_kernels_compile_for_every_card_and_spill_nothing() -> None:
    pytest.importorskip("triton")
    made = kernels.compiled()
    names = {one.kernel for one in made}
    assert {(one.kernel, one.dtype, one.capability) for one in made} == {
        (name, dtype, capability)
        for name in names
        for dtype in ("fp16", "bf16")
        for capability in kernels.CAPABILITIES
        if dtype == "fp16" or capability >= kernels.FIRST_BF16
    }
    assert names == {f"{name}"[1:] for name in kernels.signatures("fp16")}
    assert [one for one in made if one.spilled_bytes] == []
    assert max(one.shared_bytes for one in made) <= 48 << 10
