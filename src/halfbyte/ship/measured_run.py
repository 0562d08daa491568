"""Owns the reference for copies of a trained model: held-out rows, and the model's predictions on them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.data.conversation import Row, tools_of
from halfbyte.data.questions import measuring_rows
from halfbyte.host import USABLE_FRAC, free_bytes
from halfbyte.model.adapter import load_adapter
from halfbyte.model.load import Loaded
from halfbyte.model.new_tokens import set_rows
from halfbyte.model.precision import Compute, default_device
from halfbyte.model.quantised import compute_in
from halfbyte.trained.fidelity import Reference, Rows, reference, torch_predict
from halfbyte.trained.reference_logprobs import (
    Logits,
    check_reference_logprobs,
    has_reference_logprobs,
)
from halfbyte.trained.run import TrainedRun

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


@dataclass(frozen=True)
class MeasuredRun:
    """A trained run with the held-out rows on which its copies are compared with it.

    Attributes:
        trained: the run.
        held_out: the rows.
        rows: the ids and labels of each row.
    """

    trained: TrainedRun
    held_out: list[Row]
    rows: Rows

    @classmethod
    def of(cls, trained: TrainedRun, num_rows: int) -> MeasuredRun:
        """Draw ``num_rows`` held-out rows of a run, and render them."""
        held_out = measuring_rows(trained.folder, num_rows, trained.run.seed)
        encoded = [trained.renderer.encode_row(row) for row in held_out]
        return cls(trained, held_out, [(row.ids, row.labels) for row in encoded])

    @property
    def pad_id(self) -> int:
        """The token id that pads rows."""
        return self.trained.renderer.pad_id

    @property
    def conversations(self) -> list[Row]:
        """The rows without their last answers; raw-text rows are left out."""
        return [
            replace(row, messages=row.messages[:-1]) for row in self.held_out if row.text is None
        ]

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """Return the text and ids of the generation prompt of a conversation, rendered as in training."""
        renderer, conversation = self.trained.renderer, (row.messages, row.place, row.tools)
        return renderer.prompt_text(*conversation), renderer.encode_prompt(*conversation)

    def turns(self, row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Return turns and tools of a conversation as an engine's chat template is given them."""
        return self.trained.renderer.turns(row.messages), tools_of(row.tools) if row.tools else None

    def reference(self, loaded: Loaded, arithmetic: Compute) -> tuple[nn.Module, Reference]:
        """Put the adapter on its base, compute in ``arithmetic``, and predict the rows.

        Returns:
            The adapted model and its predictions.

        Raises:
            RunError: it does not predict what it did when it was trained.
        """
        vocabulary = int(loaded.model.config.vocab_size)
        folder = self.trained.folder.adapter
        model = load_adapter(loaded, folder)
        compute_in(model, arithmetic.dtype)
        if has_reference_logprobs(folder):  # runs of versions before 0.2 have none
            dtypes = (self.trained.manifest.compute_dtype.name, arithmetic.name)
            check_reference_logprobs(
                _logits(model), _logits(model, bare=True), self.trained.renderer, folder, dtypes
            )
            set_rows(model)  # which turning the adapter off has taken out
        return model, reference(torch_predict(model, self.pad_id), self.rows, vocabulary)


def measuring_compute(num_weights: int) -> Compute:
    """Return fp32 on the first device where a merged fp32 model fits, else bf16 on the CPU."""
    cpu = torch.device("cpu")
    for device in (default_device(), cpu):
        if 4 * num_weights < USABLE_FRAC * free_bytes(device):
            return Compute(device, torch.float32, "measurement")
    return Compute(cpu, torch.bfloat16, "measurement")


def _logits(model: PeftModel, *, bare: bool = False) -> Logits:
    """Return a function from token ids to the logits (V,) after them, without the adapter if ``bare``."""

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        with model.disable_adapter() if bare else contextlib.nullcontext():
            out = model(input_ids=torch.tensor([ids], device=model.device))
        return out.logits[0, -1].float().cpu()  # type: ignore[no-any-return]

    return logits
