"""Owns the kinds of fields in requests: bounded texts and numbers, and bodies whose other keys are accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from halfbyte.data.fields import SURROGATES

MAX_FIELDS = 64
MAX_STOPS = 32
MAX_STOP_CHARS = 256
MAX_TOKENS = 1 << 17
MAX_BIASES = 1024


def _refuse_surrogates(text: str) -> str:
    if SURROGATES.search(text):
        raise ValueError("contains half a character (a lone surrogate)")
    return text


def limit_fields(value: Any) -> Any:
    """Refuse too many fields at once, as each could be a separate error."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"has {len(value)} fields; at most {MAX_FIELDS} are accepted")
    return value


Text = Annotated[str, AfterValidator(_refuse_surrogates)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Label = Annotated[str, Field(max_length=256)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
# The first error in a list is enough: a body can contain hundreds of thousands of them.
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
# -1 is what llama.cpp and LM Studio write for "up to the end of the context".
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)] | Annotated[int, Field(ge=-1, le=-1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Biases = Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES)]
Options = Annotated[dict[str, Any], BeforeValidator(limit_fields)]


class Body(BaseModel):
    """A request body, or an object in it, without type coercion or NaN; further keys are kept as ``model_extra``."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_model_fields(cls, value: Any) -> Any:
        return limit_fields(value)

    def others(self, path: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the keys that are not fields, each with its path and value, also of the objects within."""
        for key, value in (self.model_extra or {}).items():
            yield f"{path}{key}", value
        for name in type(self).model_fields:
            value = getattr(self, name)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Body):
                    yield from each.others(f"{path}{name}.")
