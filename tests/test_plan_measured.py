"""Predicted beside measured: each quantity of a step, on models of several shapes, on this machine's CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.config import model_run
from halfbyte.data.prefix_tree import lay_out
from halfbyte.forward.fuse import fuse
from halfbyte.forward.packed import add_token_loss
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_config, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.plan.devices import find_device
from halfbyte.plan.memory import Planner
from halfbyte.plan.phases import BACKWARD, BACKWARD_END, FORWARD, HEAD
from halfbyte.plan.shape import Lengths
from halfbyte.train.measure import live_tensor_bytes, measure

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ROWS, LENGTH, NUM_LABELS = 2, 192, 100
SMALL: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"model_type": "llama", "num_hidden_layers": 2},
    "gemma": SMALL | {
        "model_type": "gemma3_text", "num_hidden_layers": 2, "head_dim": 64, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models with random weights, by name."""
    found = {}
    for name, fields in MODELS.items():
        rest = {key: value for key, value in fields.items() if key != "model_type"}
        config = AutoConfig.for_model(fields["model_type"], **rest)
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


@pytest.mark.parametrize(
    ("name", "checkpointing", "overrides", "card"),
    [
        ("llama", True, ["model.precision=fp32", "adapter.dropout=0.1"], None),
        ("llama", False, ["model.precision=int8"], None),
        ("gemma", True, [], None),
        ("gemma", False, ["model.attention=eager", "adapter.r=64"], None),
        ("gemma", True, [], (9, 0)),
        ("gemma", False, ["adapter.r=64"], (7, 5)),
        ("llama", False, ["model.precision=int8"], (9, 0)),
        ("llama", False, ["speed.flat_adapter=false"], (9, 0)),
    ],
    ids=str,
)
def test_step_takes_what_is_planned(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    checkpointing: bool,
    overrides: list[str],
    card: tuple[int, int] | None,
) -> None:
    """A first micro-batch, and a second one on top of its gradients, within 1 %.

    As on a card, an operator of ours is one launch: what its twin holds meanwhile does not count.
    """
    if card is not None:
        monkeypatch.setenv("HALFBYTE_CAPABILITY", f"{card[0]}.{card[1]}")
    before = live_tensor_bytes(CPU)  # what other tests of this process hold
    run = model_run(str(folders[name]), ["model.compute_dtype=fp32", *overrides])
    base = resolve_base(run.model.name)
    loaded = load_model(
        base, run.model.precision, double_quant=run.model.double_quant,
        compute=Compute(CPU, torch.float32, "test"), attention=run.model.attention,
    )  # fmt: skip
    model = attach_adapter(loaded, run.adapter, 0, tmp_path)
    add_token_loss(loaded.model)
    fuse(model, run.speed)
    if checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(1, 3000, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : -NUM_LABELS // ROWS] = -100

    padded = run.model.attention == "eager"
    rows = list(zip(ids.tolist(), labels.tolist(), strict=True))
    layout = lay_out(rows, share=not padded, padded=padded)

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(layout=layout) / NUM_LABELS
        return loss

    planner = Planner(run, load_config(base), replace(find_device("cpu-16"), capability=card))
    fixed = planner.fixed_bytes()
    new_gradients = 4 * planner.step.num_trainable
    start = fixed["weights"] + fixed["constants"] + fixed["adapter"]
    lengths = Lengths(((LENGTH, NUM_LABELS // ROWS),) * ROWS)
    for accumulates in (False, True):
        shape = lengths.shape(
            ROWS, checkpointing=checkpointing, accumulates=accumulates, share=planner.step.shares
        )
        peaks = {phase: peak.total_bytes for phase, peak in planner.step.peaks(shape).items()}
        found = measure(CPU, forward, torch.autograd.backward, profiled=card is None)
        gradients = new_gradients if accumulates else 0
        assert found.start_bytes - before == pytest.approx(start + gradients, rel=0.01)
        assert found.kept_bytes == pytest.approx(planner.step.kept(shape), rel=0.01)
        most = {
            "forward": found.forward_bytes - before,
            "backward": found.backward_bytes - before,
        }
        wanted = {
            "forward": start + max(peaks[FORWARD], peaks[HEAD]),
            "backward": start + max(peaks[BACKWARD], peaks[BACKWARD_END]),
        }
        assert most == pytest.approx(wanted, rel=0.01)
        assert found.end_bytes - found.start_bytes == pytest.approx(
            new_gradients - gradients, abs=1000
        )
        grads = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
        assert sum(grad.nbytes for grad in grads) == new_gradients
