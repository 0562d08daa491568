"""Training as on a T4, on the CPU: fp16 with a loss scale, real weights, beside the same steps in fp32."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import run_script

from halfbyte.data.addresses import build_addresses

CONFIG = Path(__file__).parents[1] / "configs" / "gemma3_270m.yaml"
STEPS, MAX_SKIPPED, TOLERANCE = 20, 2, 0.01


class TensorCores(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiplies matrices in fp16 as a T4 does: sums in fp32, rounded at the end. A CPU's own sums are slow."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        is_product = func.namespace == "aten" and "mm" in func.__name__
        halves = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.float16]
        if not (is_product and halves):
            return func(*args, **given)
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        out = given.pop("out", None)
        if func.__name__.startswith("addmm_"):
            return args[0].copy_(func(*wide, **given))
        product = getattr(torch.ops.aten, func.__name__.split(".")[0]).default(*wide, **given)
        return product.half() if out is None else out.copy_(product)


def losses_of(folder: Path, name: str, *overrides: str) -> tuple[list[dict[str, Any]], float]:
    """What each step logs, and the held-out loss at the end."""
    run_script(
        "train/sft.py",
        CONFIG,
        f"runs_dir={folder}",
        f"name={name}",
        f"data.train={folder / 'addresses' / 'train.jsonl'}",
        f"data.test={folder / 'addresses' / 'test.jsonl'}",
        f"train.max_steps={STEPS}",
        "train.batch_size=4",
        "train.log_steps=1",
        "train.eval_steps=0",
        "train.save_steps=0",
        "train.num_samples=0",
        *overrides,
    )
    text = (folder / name / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    return [record for record in records if "loss" in record], held_out[-1]


@pytest.mark.real
@pytest.mark.slow
def test_twenty_steps_as_on_a_t4_are_those_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_addresses(tmp_path / "addresses")
    wanted, wanted_held_out = losses_of(tmp_path, "fp32", "model.compute_dtype=fp32")
    capsys.readouterr()
    monkeypatch.setenv("HALFBYTE_CAPABILITY", "7.5")
    with TensorCores():  # type: ignore[no-untyped-call]
        steps, held_out = losses_of(tmp_path, "fp16")
    out = capsys.readouterr().out
    assert "compute: fp16 on cpu" in out  # chosen by itself
    off = float(out.split("measured, ")[1].split("% off plan")[0])
    assert abs(off) < 5
    assert len(steps) == len(wanted) == STEPS
    assert sum(step.get("skipped_step", 0) for step in steps) <= MAX_SKIPPED
    means = [statistics.mean(step["loss"] for step in one) for one in (steps, wanted)]
    assert means[0] == pytest.approx(means[1], rel=TOLERANCE)
    assert held_out == pytest.approx(wanted_held_out, rel=TOLERANCE)
