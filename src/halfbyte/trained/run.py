"""Owns the reading of a trained run: its settings, manifest, base and renderer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.config import Run, read_run_folder
from halfbyte.data.chat_template import template_sha256
from halfbyte.data.render import Renderer, renderer_of
from halfbyte.errors import ModelError, RunError
from halfbyte.model.adapter import load_adapter
from halfbyte.model.identity import check_same_base
from halfbyte.model.load import Loaded, load_base
from halfbyte.model.precision import DTYPES, Compute, choose_compute, default_device
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.model.tokenizer import read_tokenizer
from halfbyte.run_dir import RunDir
from halfbyte.trained.manifest import Manifest, finished_manifest


@dataclass(frozen=True)
class TrainedRun:
    """A finished training.

    Attributes:
        folder: the run folder.
        run: the run's settings, with the overrides of a later command.
        manifest: the manifest that the training wrote.
        base: the model that was trained, located again and verified to be the same.
        renderer: renders with the chat template of the training rows.
    """

    folder: RunDir
    run: Run
    manifest: Manifest
    base: Base
    renderer: Renderer

    def trained_compute(self) -> Compute:
        """Return the compute dtype of the training, or warn and choose one if this machine differs."""
        name, device = self.manifest.compute_dtype.name, default_device()
        if torch.device(self.manifest.device).type != device.type:
            print(
                f"warning: the run computed in {name} on {self.manifest.device}; here it is {device}"
            )
            return choose_compute("auto", device)
        try:
            return choose_compute(name, device)  # type: ignore[arg-type]
        except ModelError as error:
            print(f"warning: the run computed in {name}, which this machine cannot: {error}")
            return choose_compute("auto", device)

    def load_base(self, compute: Compute | None = None) -> Loaded:
        """Load the base as it was trained on.

        Without ``compute`` the training's own dtype is used on any device, because 4-bit codes quantised
        from fp32 weights differ from those of bf16 weights.
        """
        dtype = DTYPES[self.manifest.compute_dtype.name]
        exact = Compute(default_device(), dtype, "as trained")
        return load_base(self.base, self.run.model, compute or exact)

    def check_stands_alone(self) -> None:
        """Check that the adapter works on a base that is also used without it.

        Raises:
            RunError: it has rows of new tokens, for which that base has no place.
        """
        if self.base.new_tokens:
            raise RunError(
                f"{self.folder.path}: data.new_tokens gave it rows of its own in the embedding, which have no"
                " place in a base that others use. Merge the run (halfbyte merge) and serve or export what"
                f" is in {self.folder.merged}"
            )

    def load(self) -> Loaded:
        """Load the base with the run's adapter on it, as it was trained."""
        loaded = self.load_base(self.trained_compute())
        loaded.model = load_adapter(loaded, self.folder.adapter).get_base_model()
        return loaded


def read_trained_run(path: Path, run: Run | None = None) -> TrainedRun:
    """Read a run folder.

    Args:
        path: the folder.
        run: its settings with a later command's overrides; None takes them as trained.

    Raises:
        RunError: the run is not trained, or its base or its chat template has changed.
    """
    folder, run = RunDir(path.resolve()), run or read_run_folder(path)
    manifest = finished_manifest(folder)
    # The commit used in training, even if the config names a branch that has moved since.
    base = resolve_base(run.model.name, manifest.base.revision, run.data.new_tokens)
    check_same_base(manifest.base, base.identity, f"{folder.path}: was trained on")
    tokenizer = read_tokenizer(folder.adapter, str(folder.adapter))
    # The tokenizer beside the adapter has the template that it was trained with.
    template = template_sha256(tokenizer.chat_template)
    renderer = renderer_of(run.data.model_copy(update={"chat_template": None}), tokenizer)
    if template != manifest.chat_template_sha256:
        raise RunError(
            f"{folder.adapter}: its chat template is not the one that the run was trained with (sha256"
            f" differs from manifest.json). Put back the chat_template.jinja that training wrote"
        )
    return TrainedRun(folder, run, manifest, base, renderer)
