"""What a probe takes for a refusal: a fault of the architecture, and neither lost memory nor our own bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import ModelError
from halfbyte.forward import kv_cache, prefix_attention
from halfbyte.forward.packed import add_token_loss
from halfbyte.forward.prefix_attention import tree_attention
from halfbyte.forward.probes import refusal_of
from halfbyte.forward.tree_parts import PrefixTree
from halfbyte.generate import slot_model
from halfbyte.generate.continuous import slots_refusal
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base

CPU = Compute(torch.device("cpu"), torch.float32, "test")
TEXTS = [
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried to"
    " allocate 137438953472 bytes.",
]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    model: Any = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU).model
    return model.train()


def without_device_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def without_host_memory(*_: Any, **__: Any) -> Any:
    return torch.empty(1 << 50)  # PyTorch's own error: 4 PB are more than an address space has


OUT_OF_MEMORY = pytest.mark.parametrize(
    ("allocate", "kind", "text"),
    [
        (without_device_memory, torch.OutOfMemoryError, "CUDA out of memory"),
        (without_host_memory, RuntimeError, "DefaultCPUAllocator: can't allocate memory"),
    ],
)


@OUT_OF_MEMORY
def test_no_memory_for_a_tree_is_no_refusal(
    allocate: Callable[..., Any],
    kind: type[Exception],
    text: str,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_attention, "tree_attention", allocate)
    with pytest.raises(kind, match=text):
        add_token_loss(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


@OUT_OF_MEMORY
def test_no_memory_for_slots_is_no_refusal(
    allocate: Callable[..., Any],
    kind: type[Exception],
    text: str,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert add_token_loss(model) == ""
    monkeypatch.setattr(kv_cache.KVCache, "storage", allocate)
    with pytest.raises(kind, match=text):
        slots_refusal(model)
    assert model.config._attn_implementation == "halfbyte"
    assert all(module.training for module in model.modules())


def test_no_memory_for_the_head_probe_leaves_the_model_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.model, "forward", without_device_memory)
    with pytest.raises(torch.OutOfMemoryError):
        add_token_loss(model)
    assert all(module.training for module in model.modules())


def test_a_bug_of_ours_is_no_refusal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PrefixTree, "parts", lambda self, window: None)
        with pytest.raises(TypeError, match="NoneType"):
            add_token_loss(model)
    assert model.config._attn_implementation == "sdpa"
    assert add_token_loss(model) == ""
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache.KVCache, "storage", lambda self, *arguments: None)
        with pytest.raises(TypeError, match="cannot unpack"):
            slots_refusal(model)
    with monkeypatch.context() as patch:
        patch.setattr(slot_model, "SlotBatch", lambda *arguments: None)
        with pytest.raises(AttributeError, match="NoneType"):
            slots_refusal(model)
    assert model.config._attn_implementation == "halfbyte"
    assert slots_refusal(model) == ""


def test_an_architecture_that_does_not_hand_on_keywords_is_refused(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    original = attention.forward

    def strict(
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
    ) -> Any:
        return original(hidden_states, position_embeddings, attention_mask, past_key_values)

    attention.forward = strict
    refusal = add_token_loss(model)
    assert "cannot be laid out as a tree" in refusal
    assert "unexpected keyword argument 'tree'" in refusal
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("text", TEXTS)
def test_memory_errors_are_raised_as_they_are(text: str) -> None:
    for error in (RuntimeError(text), MemoryError(text)):
        with pytest.raises(type(error)) as raised:
            refusal_of(error)
        assert raised.value is error
    wrapped = ModelError("no logits")
    wrapped.__cause__ = RuntimeError(text)
    with pytest.raises(ModelError):
        refusal_of(wrapped)


def test_shapes_that_our_attention_cannot_take_are_a_refusal() -> None:
    tree = PrefixTree((), torch.device("cpu"))
    q, kv = torch.zeros(3, 5, 8), torch.zeros(2, 5, 8)
    with pytest.raises(RuntimeError, match="invalid for input of size") as raised:
        tree_attention(q, kv, kv, tree, None, None)
    assert "invalid for input of size 120" in refusal_of(raised.value)
    assert refusal_of(ModelError("capped scores")) == "capped scores"


@pytest.mark.parametrize("kind", [TypeError, AttributeError, LookupError, AssertionError])
def test_what_the_architecture_raises_is_a_refusal(kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised:
        raise kind("of the architecture")
    assert refusal_of(raised.value) == "of the architecture"
