"""Owns the common basis of config sections: strict types, and named types that several keys share."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4", "fp4"]
FOUR_BIT: tuple[Precision, ...] = ("nf4", "fp4")
ComputeDtype = Literal["auto", "fp32", "bf16", "fp16"]
Metric = Literal[
    "exact_match",
    "normalised_match",
    "numeric_match",
    "field_match",
    "schema_valid",
    "tool_match",
    "tool_valid",
    "chrf",
    "bleu",
    "rouge_l",
    "held_out_loss",
]
OwnVariant = Literal["base-full", "base-full-fewshot", "base-nf4", "adapter", "merged"]
Artefact = Annotated[str, Field(pattern="^(gguf-[a-z0-9_]+|awq)$")]  # of halfbyte export
Variant = OwnVariant | Artefact
Opponent = Literal[
    "majority",
    "nearest",
    "linear",
    "copy",
    "base-full-retrieval",
    "base-full-choices",
    "base-full-instructed",
]
OPPONENTS: tuple[Opponent, ...] = get_args(Opponent)

BRANCH = "|"  # begins the name of a union's branch, which pydantic puts into the places of errors
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section of the config with strict types and no unknown keys, frozen after reading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
