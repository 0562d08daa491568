"""Passes of one token each, as they are recorded on CUDA: the logits of the same passes computed plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.config.schema import Adapter, Speed
from halfbyte.forward.fuse import fuse_frozen, plain_lines
from halfbyte.forward.multi_lora import mix_adapters
from halfbyte.forward.slot_paths import SlotInput
from halfbyte.generate.decode_recorder import MAX_RECORDS, SEEN_BEFORE, DecodeRecorder
from halfbyte.generate.slot_model import SlotModel
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base

CPU = Compute(torch.device("cpu"), torch.float32, "test")
GROWTH, NUM_STEPS = 24, 30
STARTS = {0: 3, 5: 40, 2: 17}  # tokens of each slot's prompt; Gemma's window has 16
NAME = "default"


def slot_model(
    folder: Path, scratch: Path, *, graphs: bool, num_slots: int = 7, precision: Any = "nf4"
) -> SlotModel:
    loaded = load_model(resolve_base(str(folder)), precision, compute=CPU)
    model = attach_adapter(loaded, Adapter(r=4), 0, scratch)
    torch.manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    base: Any = model.get_base_model()
    mix_adapters(base)
    fuse_frozen(base, CPU.device)
    return SlotModel(
        base,
        num_slots=num_slots,
        max_context=128,
        dtype=torch.float32,
        growth=GROWTH,
        graphs=graphs,
    )


def all_logits(model: SlotModel, adapters: dict[int, str | None], *, shared: bool) -> torch.Tensor:
    """Logits of prompts and of steps after them; the cache grows on the way, and a slot joins late."""
    stem = list(range(5, 14)) if shared else []
    if stem:
        model.share(stem, apart=True)
    at = {slot: [*stem, *range(20, 20 + length)] for slot, length in STARTS.items()}
    first = [
        SlotInput(slot, adapters[slot], ids[len(stem) :], len(stem)) for slot, ids in at.items()
    ]
    results = [model.run(first)]
    for step in range(NUM_STEPS):
        active = list(at) if step > 9 else list(at)[:2]
        inputs = [SlotInput(slot, adapters[slot], [30 + step], len(at[slot])) for slot in active]
        for slot in active:
            at[slot].append(30 + step)
        results.append(model.run(inputs))
    return torch.cat(results)


@pytest.mark.parametrize("adapters", [(None,) * 3, (NAME,) * 3, (NAME, None, NAME)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared beginning"])
@pytest.mark.parametrize(
    ("model_name", "precision"),
    [("tiny_llama", "nf4"), ("tiny_gemma_vision", "nf4"), ("tiny_llama", "int8")],
)
def test_recorded_steps_are_the_plain_ones(
    model_name: str,
    precision: str,
    shared: bool,
    adapters: tuple[str | None, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue(model_name)
    by_slot = dict(zip(STARTS, adapters, strict=True))
    plain = slot_model(folder, tmp_path, graphs=True, precision=precision)
    wanted = all_logits(plain, by_slot, shared=shared)
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "9.0")
    model = slot_model(folder, tmp_path, graphs=True, precision=precision)
    torch.testing.assert_close(
        all_logits(model, by_slot, shared=shared), wanted, rtol=1e-4, atol=1e-4
    )
    assert isinstance(model._recorder, DecodeRecorder)
    assert model._recorder.num_replayed >= NUM_STEPS - 4 * SEEN_BEFORE - 2
    off = slot_model(folder, tmp_path, graphs=False)
    assert off._recorder is None


def test_a_grown_cache_and_too_many_kinds_are_recorded_anew(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "9.0")
    model = slot_model(tiny_llama, tmp_path, graphs=True, num_slots=40)
    recorder = model._recorder
    assert recorder is not None
    model.run([SlotInput(slot, None, [5, 6], 0) for slot in range(40)])
    for size in range(1, 41):
        for position in range(2, 6):
            model.run([SlotInput(slot, None, [7], position) for slot in range(40 - size, 40)])
            model.run([SlotInput(slot, NAME, [7], position) for slot in range(size)])
    assert 6 < len(recorder._records) <= MAX_RECORDS
    before = recorder.num_replayed
    for position in range(6, 2 * GROWTH):
        model.run([SlotInput(0, None, [7], position)])
    # But for the first of a kind, and the one that grows the cache.
    assert recorder.num_replayed == before + 2 * GROWTH - 6 - SEEN_BEFORE - 1
    assert len(recorder._records) == 1
    model.forget()
    model.run([SlotInput(0, None, [5, 6], 0)])
    before = recorder.num_replayed
    model.run([SlotInput(0, None, [7], 2)])
    assert recorder.num_replayed == before + 1
    assert recorder._records.keys() == {(1, 1, ((None, 1),))}  # anew, in the new storage


def test_a_step_that_cannot_be_recorded_is_computed_plainly_and_said(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    by_slot = dict.fromkeys(STARTS)
    wanted = all_logits(slot_model(tiny_llama, tmp_path, graphs=False), by_slot, shared=False)
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "9.0")
    monkeypatch.setattr("halfbyte.generate.decode_recorder.RecordedStep", fail)
    model = slot_model(tiny_llama, tmp_path, graphs=True)
    logits = all_logits(model, by_slot, shared=False)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert "not recorded: RuntimeError: operation not permitted" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "nf4"])
def test_layers_of_a_model_that_answers_are_fused_in_every_precision(
    precision: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "9.0")
    model: Any = load_model(resolve_base(str(tiny_llama)), precision, compute=CPU).model
    fuse_frozen(model, CPU.device)
    assert plain_lines(model, Speed(varlen_attention=False), CPU.device) == []
