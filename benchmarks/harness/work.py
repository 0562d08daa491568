"""Owns the work of a step: floating-point operations that training needs, whatever a tool spends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.rows import STEP_ROWS, Row


@dataclass(frozen=True)
class Work:
    """What a token, a labelled token and a pair of tokens of a row cost, in FLOP.

    The base's weights are multiplied forward and for the gradient of their input (2 + 2 a weight), the
    adapter's also for their own gradient (6); the head meets labelled tokens only, forward and backward
    (4). Attention is causal, and its backward pass takes 2.5 times the forward one. Nothing is
    computed twice, nor on padding.
    """

    token: float
    labelled: float
    pair: float

    def of(self, rows: list[Row]) -> float:
        """FLOP of forward and backward passes over rows."""
        lengths = [len(ids) for ids, _ in rows]
        pairs = sum(length * length / 2 for length in lengths)
        return self.token * sum(lengths) + self.labelled * num_labelled(rows) + self.pair * pairs

    def of_steps(self, rows: list[Row]) -> list[dict[str, float]]:
        """Tokens, labelled tokens and FLOP of each optimizer step over rows in their order."""
        steps = [rows[start : start + STEP_ROWS] for start in range(0, len(rows), STEP_ROWS)]
        return [
            {
                "tokens": sum(len(ids) for ids, _ in step),
                "labelled": num_labelled(step),
                "flop": self.of(step),
            }
            for step in steps
        ]


def num_labelled(rows: list[Row]) -> int:
    """Tokens that the loss counts: the first of a row has none before it to follow from."""
    return sum(label >= 0 for _, labels in rows for label in labels[1:])


def work_of(folder: Path, rank: int) -> Work:
    """The work of a model whose configuration lies in ``folder``; a sliding window counts as none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    body = sum(m.in_features * m.out_features for m in linears)
    adapter = sum(rank * (m.in_features + m.out_features) for m in linears)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Work(
        token=4 * body + 6 * adapter,
        labelled=4 * head.in_features * head.out_features,
        pair=3.5 * 4 * config.num_hidden_layers * config.num_attention_heads * width,
    )
