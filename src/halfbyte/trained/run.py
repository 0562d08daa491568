"""Owns reading a trained run back: its base, its renderer, the dtype it computed in."""

from __future__ import annotations

from pathlib import Path

import torch

from halfbyte.config import Run, read_run_folder
from halfbyte.data.render import Renderer
from halfbyte.errors import ModelError, RunError
from halfbyte.model.adapter import load_adapter
from halfbyte.model.load import Loaded, load_base, load_tokenizer
from halfbyte.model.precision import Compute, choose_compute, default_device
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.run_dir import RunDir, read_json


def trained_base(folder: RunDir, run: Run) -> Base:
    """The base that a run was trained on.

    Raises:
        RunError: the run is not trained, or the base is another one by now.
    """
    folder.trained()
    told = read_json(folder.manifest)["base"]
    # The commit of that day, even where the config names a branch that has moved since.
    base = resolve_base(run.model.name, told["revision"])
    if told["fingerprint"] != base.fingerprint:
        raise RunError(f"{folder.path}: the base {base.name} has changed since the run was trained")
    return base


def saved_renderer(folder: RunDir, run: Run, base: Base) -> Renderer:
    """The renderer with the chat template that the run was trained with."""
    adapter = folder.trained()
    tokenizer = load_tokenizer(Base(base.name, str(adapter), None, base.origin, base.fingerprint))
    return Renderer(tokenizer, None, run.data.loss_on)


def same_compute(folder: RunDir) -> Compute:
    """The compute dtype that the run was trained with, if this machine is of the same kind."""
    manifest = read_json(folder.manifest)
    device = default_device()
    name = manifest["compute_dtype"]["name"]
    if torch.device(manifest["device"]).type == device.type:
        try:
            return choose_compute(name, device)
        except ModelError as error:
            print(f"warning: the run computed in {name}, which this machine cannot: {error}")
    else:
        print(f"warning: the run computed in {name} on {manifest['device']}; here it is {device}")
    return choose_compute("auto", device)


def load_trained(path: Path) -> tuple[Loaded, Renderer]:
    """The quantised base with the run's adapter on it, as it was trained, and its renderer."""
    folder, run = RunDir(path.resolve()), read_run_folder(path)
    base = trained_base(folder, run)
    loaded = load_base(base, run.model, same_compute(folder))
    adapted = load_adapter(loaded, folder.adapter)
    loaded.model = adapted.get_base_model()
    return loaded, saved_renderer(folder, run, base)
