"""What is not finite stops the step that made it, by name; steps that teach nothing are stopped with the cause."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from test_training import make_trainer
from toys import run_script
from transformers import TrainerControl, TrainerState, TrainingArguments

from halfbyte.errors import RunError
from halfbyte.train import watchdog
from halfbyte.train.checkpoints import SEAL
from halfbyte.train.finite import all_finite
from halfbyte.train.guards import check_labels, way_on
from halfbyte.train.learning import largest_change
from halfbyte.train.trainer import TokenTrainer
from halfbyte.train.watchdog import StepWatch

STEPS = {"max_steps": 6, "save_steps": 2, "log_steps": 1, "batch_size": 4}


def plant(trainer: TokenTrainer, step: int, act: Callable[[Any], None]) -> None:
    """Do something to a trainer before the passes of a step."""
    usual = trainer.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        if trainer.state.global_step + 1 == step:
            act(trainer)
        return usual(*args, **options)

    trainer.training_step = training_step  # type: ignore[method-assign]


def spoil_state(name: str, value: float) -> Callable[[Any], None]:
    def act(trainer: Any) -> None:
        states = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
        next(iter(states.values()))[name].view(-1)[0] = value

    return act


def spoil_base(trainer: Any) -> None:
    trainer.model.get_base_model().model.norm.weight.data[0] = math.nan


def spoil_gradient(trainer: Any) -> None:
    trainer.trained[0].register_hook(lambda gradient: gradient * math.inf)


def spoil_activation(trainer: Any) -> None:
    layer = trainer.model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda module, inputs, output: output * math.nan)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (spoil_state("exp_avg", math.nan), r"step 5: the adapter's weight \S+ is NaN or infinite after it"),
        (spoil_state("exp_avg_sq", math.inf), r"step 5: a state of the optimizer is NaN or infinite"),
        (spoil_base, r"step 5: the base's weight \S+norm.weight holds NaN"),
        (spoil_gradient, r"step 5: the loss or a gradient is NaN .* the rows are \S+train.jsonl:\d+, "),
        (spoil_activation, r"step 5: the loss of \S+train.jsonl:\d+, .* first in the output of \S+layers\.1"),
    ],
    ids=["first moment", "second moment", "base", "gradient", "activation"],
)  # fmt: skip
def test_what_is_not_finite_is_named_in_its_step_and_never_saved(
    make_config: MakeConfig, act: Callable[[Any], None], text: str
) -> None:
    trainer, _ = make_trainer(make_config(train=STEPS))
    plant(trainer, 5, act)
    with pytest.raises(RunError, match=text) as stopped:
        trainer.train()
    assert "Nothing of this step is saved. Go" in str(stopped.value)
    found = sorted(path.parent.name for path in trainer.checkpoints.glob(f"*/{SEAL}"))
    assert found == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    ("sections", "cause"),
    [
        ({"adapter": {"alpha": 1e-12}}, "adapter.alpha 1e-12 is too small"),
        ({"train": STEPS | {"learning_rate": 1e-30}}, "train.learning_rate 1e-30 is too small"),
        ({"train": STEPS | {"max_grad_norm": 1e-38}}, "train.max_grad_norm 1e-38 is too small"),
    ],
    ids=["alpha", "rate", "clipping"],
)
def test_an_adapter_that_stands_still_is_an_error_with_its_cause(
    make_config: MakeConfig, sections: dict[str, Any], cause: str
) -> None:
    trainer, _ = make_trainer(make_config(**{"train": STEPS, **sections}))
    with pytest.raises(RunError, match="so that nothing is learnt") as stopped:
        trainer.train()
    assert f"Most likely {cause}" in str(stopped.value)
    assert "train.existing=replace" in str(stopped.value)


def test_gradients_of_zero_are_an_error_after_three_steps(make_config: MakeConfig) -> None:
    def act(trainer: Any) -> None:
        for parameter in trainer.trained:
            parameter.register_hook(torch.zeros_like)

    trainer, _ = make_trainer(make_config(train=STEPS | {"max_steps": 9}))
    plant(trainer, 4, act)
    with pytest.raises(RunError, match=r"step 6: the gradient .* has been zero for 3 steps"):
        trainer.train()


def test_a_destroyed_model_is_an_error(make_config: MakeConfig) -> None:
    train = STEPS | {"max_steps": 60, "log_steps": 5, "learning_rate": 1, "save_steps": 0}
    trainer, _ = make_trainer(make_config(train=train, adapter={"alpha": 1e6}))
    with pytest.raises(RunError, match=r"knows nothing|has been zero") as stopped:
        trainer.train()
    assert "adapter.alpha 1e+06 is too high and train.learning_rate 1 is too high" in str(
        stopped.value
    )


@pytest.mark.parametrize("rate", [1e-6, 1e-2])
def test_a_training_that_learns_slowly_is_no_alarm(make_config: MakeConfig, rate: float) -> None:
    trainer, _ = make_trainer(make_config(train=STEPS | {"max_steps": 30, "learning_rate": rate}))
    trainer.train()
    change = largest_change(trainer.model)
    assert change is not None
    assert change > 1e-8


def test_largest_change_bounds_the_entries_of_every_update(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config(train=STEPS))
    assert largest_change(trainer.model) == 0
    trainer.train()
    change, largest = largest_change(trainer.model), 0.0
    for module in trainer.model.modules():
        if hasattr(module, "lora_A"):
            update = module.get_delta_weight("default")
            largest = max(largest, float(update.square().mean().sqrt()))
    assert change is not None
    assert 0 < largest <= change


def test_a_step_without_a_weight_is_an_error_with_its_rows() -> None:
    assert check_labels(0.5, ["a"]) == 0.5
    with pytest.raises(RunError, match=r"no labelled token of any weight; its rows are a, b"):
        check_labels(0, ["a", "b"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_makes_all_not_finite(value: float) -> None:
    good = [torch.ones(3), torch.zeros(2, 2)]
    assert bool(all_finite(good))
    assert not bool(all_finite([*good, torch.tensor([1.0, value])]))


def test_advice_is_the_command_for_what_is_on_disk(tmp_path: Path) -> None:
    assert way_on(tmp_path, "a=1").startswith("Start over: ")
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-5" / SEAL).touch()
    assert way_on(tmp_path) == (f"Go on from checkpoint-5: halfbyte train {tmp_path}/run.yaml")
    assert way_on(tmp_path, "a=1").endswith("run.yaml train.resume_from=5 a=1")
    assert way_on(tmp_path, "a=1", anew=True).endswith("run.yaml train.existing=replace a=1")


def test_advice_of_a_stopped_run_works(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = TokenTrainer.training_step

    def spoilt(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 4:
            spoil_gradient(self)
        return usual(self, *args, **options)

    config = make_config(train=STEPS, track={"wandb": "off"})
    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "training_step", spoilt)
        with pytest.raises(SystemExit):
            run_script("train/sft.py", config)
    (command,) = re.findall(r"halfbyte train (.*)", capsys.readouterr().err)
    assert command.endswith("train.resume_from=4 train.learning_rate=0.0025")
    run_script("train/sft.py", *command.split())
    assert (tmp_path / "runs" / "tiny-from-4" / "adapter" / "adapter_config.json").is_file()


def test_a_step_that_takes_far_longer_than_those_before_is_said_once() -> None:
    now = 0.0
    watch = StepWatch(clock=lambda: now)
    state, control, settings = TrainerState(), TrainerControl(), TrainingArguments()
    for seconds in (90.0, 2.0, 2.0, 2.0):  # the first compiles
        watch.on_step_begin(settings, state, control)
        assert watch.late() == ""
        now += seconds
        assert watch.late() == ""
        watch.on_step_end(settings, state, control)
        state.global_step += 1
    now += 1000  # an evaluation
    assert watch.late() == ""
    watch.on_step_begin(settings, state, control)
    now += 59
    assert watch.late() == ""
    now += 2
    assert "step 5 has taken 61 s so far, where a step took 2 s" in watch.late()
    assert watch.late() == ""


def test_a_late_step_is_said_while_it_lasts(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "LEAST_S", 0.3)
    monkeypatch.setattr(watchdog, "TIMES", 2)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    said, usual_late, usual_step = threading.Event(), StepWatch.late, TokenTrainer.training_step

    def late(self: StepWatch) -> str:
        warning = usual_late(self)
        if warning:
            said.set()
        return warning

    def hang(self: TokenTrainer, *arguments: Any) -> Any:
        if self.state.global_step == 5:
            assert said.wait(60)
        return usual_step(self, *arguments)

    monkeypatch.setattr(StepWatch, "late", late)
    monkeypatch.setattr(TokenTrainer, "training_step", hang)
    run_script("train/sft.py", make_config(train={"max_steps": 6, "save_steps": 0}))
    assert "warning: step 6 has taken " in capsys.readouterr().err
