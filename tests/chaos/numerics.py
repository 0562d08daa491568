"""NaN in a loss, a gradient, an activation, a weight or a state, and ways to learn nothing: stopped, named, and mended."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chaos.farm import ROOT, run
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene, train
from halfbyte.config import load_run
from halfbyte.train.checkpoints import all_checkpoints, fault_of, step_of

NAN, NOTHING = "NaN and infinity", "learning nothing"
STEP = 5
FULL = 0.1  # the scale from which on all are tried
Plant = Callable[[Any, int], None]


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Each plant at a step, followed by what its message advises; then each way to learn nothing."""
    every = 1 if scale >= FULL else 4
    for name, (plant, texts) in list(PLANTS.items())[::every]:
        yield Case(NAN, name, partial(_stops, scene, name, plant, texts))
    for name, (sections, texts) in list(NOTHINGS.items())[::every]:
        yield Case(NOTHING, name, partial(_is_named, scene, name, sections, texts))
    yield Case(NOTHING, "gradients of zero from a step on", partial(_zero, scene))
    yield Case(NOTHING, "an optimizer that takes no step", partial(_no_step, scene))
    yield Case(NOTHING, "settings that learn slowly are no alarm", partial(_slow, scene))
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        name = f"the settings of configs/{path.name} are no alarm"
        yield Case(NOTHING, name, partial(_shipped, scene, path))


def at_step(step: int, plant: Plant) -> Callable[[], None]:
    """Return what puts a plant into the trainer of a child, before the passes of a step."""

    def patch() -> None:
        from halfbyte.train.trainer import TokenTrainer

        usual = TokenTrainer.training_step

        def training_step(self: Any, *args: Any, **options: Any) -> Any:
            now = self.state.global_step + 1
            if now >= step:
                plant(self, now - step)
            return usual(self, *args, **options)

        TokenTrainer.training_step = training_step  # type: ignore[method-assign]

    return patch


def _state(value: float, name: str) -> Plant:
    def plant(trainer: Any, late: int) -> None:
        if late == 0:
            states = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
            next(iter(states.values()))[name].view(-1)[0] = value

    return plant


def _weight(trainer: Any, late: int) -> None:
    with torch.no_grad():
        trainer.trained[0].view(-1)[0] = torch.nan


def _base(trainer: Any, late: int) -> None:
    with torch.no_grad():
        trainer.model.get_base_model().model.norm.weight[3] = torch.inf


def _base_constants(trainer: Any, late: int) -> None:
    for parameter in trainer.model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            state.state2.absmax[0] = torch.nan
            return


def _loss(trainer: Any, late: int) -> None:
    if late == 0:
        trainer.model.register_forward_hook(lambda module, inputs, output: output * torch.nan)


def _gradient(trainer: Any, late: int) -> None:
    if late == 0:
        trainer.trained[-1].register_hook(lambda gradient: gradient * torch.nan)


def _activation(trainer: Any, late: int) -> None:
    if late == 0:
        layer = trainer.model.get_base_model().model.layers[1]
        layer.register_forward_hook(lambda module, inputs, output: output * torch.inf)


PLANTS: dict[str, tuple[Plant, tuple[str, ...]]] = {
    "NaN in the loss": (_loss, ("NaN",)),
    "NaN in a gradient": (_gradient, ("gradient", "train.jsonl")),
    "infinity in an activation": (_activation, ("train.jsonl", "layers.1")),
    "NaN in the first moment": (_state(torch.nan, "exp_avg"), ("adapter's weight",)),
    "infinity in the second moment": (_state(torch.inf, "exp_avg_sq"), ("state of the optimizer",)),
    "NaN in a weight of the adapter": (_weight, ("adapter's weight",)),
    "infinity in a weight of the base": (_base, ("base's weight", "norm")),
    "NaN in the constants of a 4-bit weight": (_base_constants, ("base's weight", "proj")),
}


def _stops(scene: Scene, name: str, plant: Plant, texts: tuple[str, ...]) -> str:
    folder = scene.folder("nan-" + name.replace(" ", "-"))
    run_folder = folder / "runs" / "tiny"
    stopped = train(scene.config(folder), before=at_step(STEP, plant))
    said = stopped.says(f"error: step {STEP}: ", *texts)
    if said or stopped.code != 1:
        return said or f"ended with {stopped.code}"
    found = all_checkpoints(run_folder / "checkpoints")
    if not found or any(fault_of(path) for path in found) or step_of(found[0]) >= STEP:
        return f"on disk: {[path.name for path in found]}"
    if (run_folder / "adapter").exists():
        return "an adapter was saved"
    return follow_advice(stopped.text, folder)


def follow_advice(text: str, folder: Path) -> str:
    """Run the command that a message ends with; return why it does not train to the end, or ""."""
    found = re.findall(r"halfbyte train (.*)", text)
    if not found:
        return f"no advice: {text[-300:]}"
    ended = run("train/sft.py", *shlex.split(found[-1]), log=folder / "advice", environ=OFFLINE)
    return (
        ""
        if ended.code == 0
        else f"its advice {found[-1]} ended with {ended.code}: {ended.text[-300:]}"
    )


LONG = {"max_steps": 60, "log_steps": 2, "save_steps": 20, "eval_steps": 0}
NOTHINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "alpha 1e-12": ({"adapter": {"alpha": 1e-12}}, ("adapter.alpha",)),
    "alpha 1e-30": ({"adapter": {"alpha": 1e-30}}, ("adapter.alpha",)),
    "rate 1e-30": ({"train": {"learning_rate": 1e-30}}, ("train.learning_rate",)),
    "rate 1e-13": ({"train": {"learning_rate": 1e-13}}, ("train.learning_rate",)),
    "clipped to 1e-38": ({"train": {"max_grad_norm": 1e-38}}, ("train.max_grad_norm",)),
    "clipped to 1e-25": ({"train": {"max_grad_norm": 1e-25}}, ("train.max_grad_norm",)),
    "rate 1, alpha 1e6": (
        {"train": LONG | {"learning_rate": 1}, "adapter": {"alpha": 1e6}},
        ("train.learning_rate",),
    ),
    "dropout of everything": ({"adapter": {"dropout": 0.999999}}, ("",)),
}


def _is_named(scene: Scene, name: str, sections: dict[str, Any], texts: tuple[str, ...]) -> str:
    folder = scene.folder("nothing-" + name.replace(" ", "-").replace(",", ""))
    ended = train(scene.config(folder, **sections))
    said = ended.says("error: ", *texts)
    if said or ended.code not in (1, 2):
        return said or f"ended with {ended.code}"
    return follow_advice(ended.text, folder) if "halfbyte train" in ended.text else ""


def _zero(scene: Scene) -> str:
    def plant(trainer: Any, late: int) -> None:
        if late == 0:
            for parameter in trainer.trained:
                parameter.register_hook(torch.zeros_like)

    folder = scene.folder("nothing-zero")
    config = scene.config(folder, train={"max_steps": 12})
    return train(config, before=at_step(STEP, plant)).says(
        "error: step 7", "has been zero for 3 steps"
    )


def _no_step(scene: Scene) -> str:
    def patch() -> None:
        torch.optim.AdamW.step = lambda self, closure=None: None  # type: ignore[method-assign]

    folder = scene.folder("nothing-no-step")
    return train(scene.config(folder), before=patch).says("error: step", "changes no weight")


def _slow(scene: Scene) -> str:
    folder = scene.folder("nothing-slow")
    config = scene.config(
        folder, train={"max_steps": 60, "learning_rate": 1e-6, "log_steps": 5, "eval_steps": 0}
    )
    return "" if train(config).code == 0 else "an alarm, though it learns"


def _shipped(scene: Scene, path: Path) -> str:
    """Train with the settings of a shipped config for as long as all guards need."""
    shipped = load_run(path, [])
    kept = {
        "learning_rate",
        "scheduler",
        "warmup_frac",
        "weight_decay",
        "max_grad_norm",
        "optimizer",
    }
    steps = {"max_steps": 80, "log_steps": 5, "eval_steps": 0, "save_steps": 0}
    config = scene.config(
        scene.folder(f"nothing-{path.stem}"),
        train=shipped.train.model_dump(mode="json", include=kept) | steps,
        adapter=shipped.adapter.model_dump(mode="json", exclude={"init"}),
    )
    ended = train(config)
    return "" if ended.code == 0 else f"an alarm, though it learns: {ended.text[-300:]}"
