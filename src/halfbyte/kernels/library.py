"""Owns the table of our operators: for each a schema, a twin in PyTorch, its shapes, and its CUDA side.

An operator is called as ``torch.ops.halfbyte.NAME``. On CUDA it launches a kernel of Triton, or one
operator of PyTorch. On a CPU it runs its twin, the formula that the kernel is tested against; passes on a CPU
call the twins only where ``HALFBYTE_CAPABILITY`` makes them compute as on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "halfbyte"
_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


@dataclass
class Operator:
    """One of our operators.

    Attributes:
        twin: computes it with PyTorch's operators, on any device.
        shapes: returns tensors of its results' shapes and dtypes without their data.
        launch: computes it on CUDA.
    """

    twin: Callable[..., Any]
    shapes: Callable[..., Any]
    launch: Callable[..., Any]


OPERATORS: dict[str, Operator] = {}


def define(schema: str, operator: Operator) -> None:
    """Register an operator with PyTorch under the name that its schema begins with."""
    name = schema.split("(")[0]
    OPERATORS[name] = operator
    _library.define(schema)
    # Looked up at each call, so that a twin can be watched.
    if "!" in schema:
        _library.impl(name, lambda *given: _fresh(operator.twin(*given), given), "CPU")
    else:
        _library.impl(name, lambda *given: operator.twin(*given), "CPU")
    _library.impl(name, operator.launch, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", operator.shapes, lib=_library)


def _fresh(result: Any, given: tuple[Any, ...]) -> Any:
    """Return a result that is none of the arguments, as an operator's must be: this twin works in place."""
    return result.clone() if any(result is one for one in given) else result
