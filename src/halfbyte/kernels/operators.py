"""Owns which operators there are, and whether passes on a device use them.

A pass uses them on CUDA where Triton can be imported and compiles, and on a CPU where it computes as on CUDA
(``capability.SETTING``) or is planned.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.kernels import gates, norms, products, rotary, softmax, unpack, varlen
from halfbyte.kernels.capability import TURING, capability_of, is_planned
from halfbyte.kernels.library import OPERATORS, Operator, define

# Each is one operator of PyTorch on CUDA.
WITHOUT_TRITON = {"varlen", "varlen_backward", "mm_fp32", "addmm_fp32_"}
_kernels_are_on = True


def uses_operators(device: torch.device) -> bool:
    """Whether passes on a device are computed as on CUDA: in one attention call, and by our operators."""
    capability = capability_of(device)
    return capability is not None and capability >= TURING


def launched(name: str, device: torch.device) -> Callable[..., Any] | None:
    """Return our operator of that name if passes on a device call it.

    PyTorch's dispatcher takes as long as a launch, so it is left out where nothing watches what it dispatches.
    """
    if not uses_operators(device):
        return None
    if name not in WITHOUT_TRITON and (
        not _kernels_are_on or (device.type == "cuda" and triton_refusal())
    ):
        return None
    if is_planned() or _is_in_any_mode():
        return _dispatched(name)
    one = OPERATORS[name]
    return one.launch if device.type == "cuda" else one.twin


def _is_in_any_mode() -> bool:
    """Whether a mode of PyTorch sees the operators that are called now."""
    # Private, tried with torch 2.13: there is no public way to tell. Without it plans would not see our operators
    # as one each, and their tests would fail.
    return bool(torch._C._len_torch_dispatch_stack())


@functools.cache
def _dispatched(name: str) -> Callable[..., Any]:
    call: Callable[..., Any] = getattr(torch.ops.halfbyte, name).default
    return call


def operator(name: str, device: torch.device) -> Callable[..., Any]:
    """Return our operator of that name; its formula where passes on a device do not call it."""
    return launched(name, device) or OPERATORS[name].twin


def mm_fp32(a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Return alpha·a·b (N, K) in fp32, of a (N, M) and b (M, K); on a CPU rounded to their dtype before."""
    call = launched("mm_fp32", a.device)
    product: torch.Tensor
    if call is not None:
        product = call(a, b, alpha)
        return product
    product = (a @ b).float()
    return product if alpha == 1 else product.mul_(alpha)


def addmm_fp32_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a·b (N, K) to a total in fp32, in place; on a CPU rounded to their dtype before."""
    call = launched("addmm_fp32_", a.device)
    if call is not None:
        call(total, a, b)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def use_kernels(on: bool) -> None:
    """Switch kernels in Triton on or off in this process."""
    global _kernels_are_on
    _kernels_are_on = on


@functools.cache
def triton_refusal() -> str:
    """Return why Triton cannot compile for the device of this process, or ""; tried once."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        one = torch.ones((1, 8), device="cuda")
        _launch("rms_norm")(one, one[0], 1e-6, None)
    except Exception as error:  # whatever a compiler, a driver or a missing header raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _launch(name: str) -> Callable[..., Any]:
    """Return the function of that name in the modules of Triton's kernels, imported when it is called."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        from halfbyte.kernels import triton_blocks, triton_layers

        return getattr(  # type: ignore[no-any-return]
            triton_layers if hasattr(triton_layers, name) else triton_blocks, name
        )

    return lambda *given: kernel()(*given)


def norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated queries (T, H, D) and keys (T, G, D); see ``rotary``."""
    return (
        rotary.norm_rope(query, cos, sin, query_weight, eps),
        rotary.norm_rope(key, cos, sin, key_weight, eps),
    )


def norm_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of queries (T, H, D) and keys (T, G, D)."""
    return (
        rotary.norm_rope_backward(dq, query, cos, sin, query_weight, eps),
        rotary.norm_rope_backward(dk, key, cos, sin, key_weight, eps),
    )


def _launch_norm_rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, *given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = _launch("norm_rope")(*given, (dq, dk))
    return result


def _like(number: int) -> Callable[..., torch.Tensor]:
    """Return shapes of a result that is like argument ``number``."""
    return lambda *given: torch.empty_like(given[number])


def _norm_shapes(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty_like(x if residual is None else residual)


def _pair_like(first: int, second: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return lambda *given: (torch.empty_like(given[first]), torch.empty_like(given[second]))


_ROTARY = "Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, float eps"
_STARTS = "Tensor query_starts, Tensor key_starts, int[] longest, int window, float scale"

define(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> Tensor",
    Operator(norms.rms_norm, _norm_shapes, _launch("rms_norm")),
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> Tensor",
    Operator(norms.rms_norm_backward, _like(1), _launch("rms_norm_backward")),
)
define(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    Operator(gates.glu, _like(0), _launch("glu")),
)
define(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    Operator(gates.glu_backward, _pair_like(1, 2), _launch("glu_backward")),
)
define(
    f"norm_rope(Tensor query, Tensor key, {_ROTARY}) -> (Tensor, Tensor)",
    Operator(norm_rope, _pair_like(0, 1), _launch("norm_rope")),
)
define(
    f"norm_rope_backward(Tensor dq, Tensor dk, Tensor query, Tensor key, {_ROTARY}) -> (Tensor, Tensor)",
    Operator(norm_rope_backward, _pair_like(2, 3), _launch_norm_rope_backward),
)
define(
    "unpack_4bit(Tensor codes, Tensor maxima, Tensor table, Tensor? nested_table, Tensor? nested_maxima,"
    " Tensor? offset, int block, int[] shape, ScalarType dtype) -> Tensor",
    Operator(
        unpack.unpack_4bit,
        lambda codes, *given: codes.new_empty(given[-2], dtype=given[-1]),
        _launch("unpack_4bit"),
    ),
)
define(
    f"varlen(Tensor query, Tensor key, Tensor value, {_STARTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    Operator(varlen.varlen, varlen.varlen_shapes, varlen.launch_varlen),
)
define(
    "varlen_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor[] results,"
    f" {_STARTS}) -> (Tensor, Tensor, Tensor)",
    Operator(
        varlen.varlen_backward,
        lambda gradient, *inputs: tuple(map(torch.empty_like, inputs[:3])),
        varlen.launch_varlen_backward,
    ),
)
define(
    "mm_fp32(Tensor a, Tensor b, float alpha) -> Tensor",
    Operator(products.mm_fp32, products.mm_fp32_shapes, products.launch_mm_fp32),
)
define(
    "addmm_fp32_(Tensor(a!) total, Tensor a, Tensor b) -> ()",
    Operator(products.addmm_fp32_, products.addmm_fp32_shapes, products.launch_addmm_fp32_),
)
define(
    "sum_copies(Tensor copies, Tensor starts, Tensor places) -> Tensor",
    Operator(products.sum_copies, products.sum_copies_shapes, _launch("sum_copies")),
)
define(
    "softmax_block(Tensor(a!) logits, Tensor labels, int first, Tensor(b!) running, float softcap,"
    " ScalarType dtype) -> Tensor",
    Operator(softmax.softmax_block, softmax.softmax_block_shapes, _launch("softmax_block")),
)
