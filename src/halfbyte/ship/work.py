"""Owns what a merge and an export need of a run: its base, its renderer, rows to measure on, the trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from halfbyte.config import Run
from halfbyte.data.questions import measuring_rows
from halfbyte.data.render import Renderer
from halfbyte.data.rows import Message
from halfbyte.host import USABLE_FRAC, free_bytes
from halfbyte.model.adapter import load_adapter
from halfbyte.model.load import Loaded, load_base
from halfbyte.model.precision import DTYPES, Compute, default_device
from halfbyte.model.quantised import compute_in
from halfbyte.model.resolve import Base
from halfbyte.run_dir import RunDir, read_json
from halfbyte.ship.merge_math import Update, read_updates
from halfbyte.trained.fidelity import Reference, Rows, reference, torch_predict
from halfbyte.trained.run import saved_renderer, trained_base

if TYPE_CHECKING:
    from torch import nn


class Work:
    """A trained run, read back.

    Raises:
        RunError: it is not trained, its base has changed, or its adapter cannot be merged.
    """

    def __init__(self, folder: RunDir, run: Run, num_rows: int | None = None) -> None:
        self.folder, self.run = folder, run
        self.told: dict[str, Any] = read_json(folder.manifest)
        self.base: Base = trained_base(folder, run)
        self.renderer: Renderer = saved_renderer(folder, run, self.base)
        self.updates: dict[str, Update] = read_updates(folder.trained())
        self.measuring = measuring_rows(folder, num_rows or run.merge.rows, run.seed)
        encoded = [self.renderer.encode_row(row) for row in self.measuring]
        self.rows: Rows = [(row.ids, row.labels) for row in encoded]
        self.pad_id = self.renderer.pad_id

    @property
    def conversations(self) -> list[tuple[Message, ...]]:
        """What the measuring rows ask, without their last answers; none for raw text."""
        return [row.messages[:-1] for row in self.measuring if row.text is None]

    def prompt(self, messages: tuple[Message, ...]) -> tuple[str, list[int]]:
        """Text and ids of a generation prompt as in training."""
        return self.renderer.prompt_text(messages), self.renderer.encode_prompt(messages)

    def load_base(self) -> Loaded:
        """The base as it was trained on.

        In the same dtype: codes quantised from fp32 weights are not those from bf16 ones.
        """
        dtype = DTYPES[self.told["compute_dtype"]["name"]]
        return load_base(self.base, self.run.model, Compute(default_device(), dtype, "as trained"))

    def reference(self, trained: Loaded, arithmetic: Compute) -> tuple[nn.Module, Reference]:
        """The base with its adapter, computing in ``arithmetic``, and what it predicts on the rows."""
        vocabulary = int(trained.model.config.vocab_size)
        model = load_adapter(trained, self.folder.adapter)
        compute_in(model, arithmetic.dtype)
        predict = torch_predict(model, self.pad_id)
        return model, reference(predict, self.rows, vocabulary)


def measuring(num_weights: int) -> Compute:
    """fp32 on the first device where a merged fp32 model fits, else bf16 on the CPU."""
    cpu = torch.device("cpu")
    for device in (default_device(), cpu):
        if 4 * num_weights < USABLE_FRAC * free_bytes(device):
            return Compute(device, torch.float32, "measurement")
    return Compute(cpu, torch.bfloat16, "measurement")
