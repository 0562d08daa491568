"""Owns what a served model reads and writes: conversations and text to ids, ids to text."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

from halfbyte.data.render import Renderer
from halfbyte.data.rows import Message
from halfbyte.errors import DataError


class Words(Protocol):
    """Tokens and template of a model."""

    stop_ids: frozenset[int]

    def chat(self, messages: tuple[Message, ...]) -> list[int]:
        """Ids of a generation prompt."""

    def text(self, text: str) -> list[int]:
        """Ids of plain text."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens left out, spaces kept."""

    def piece(self, token: int) -> tuple[str, list[int]]:
        """One token as text and as bytes, control tokens too."""

    def matcher(self, schema: dict[str, Any]) -> Any:
        """A grammar's state for answers of a JSON schema.

        Raises:
            DataError: the schema cannot be followed.
        """


@dataclass
class RendererWords:
    """Those of a run: the very renderer that it was trained with."""

    renderer: Renderer
    vocab_size: int

    @property
    def stop_ids(self) -> frozenset[int]:
        """As in training and evaluation."""
        return frozenset(self.renderer.stop_ids)

    def chat(self, messages: tuple[Message, ...]) -> list[int]:
        """As ``Words.chat``."""
        return self.renderer.encode_prompt(messages, "messages")

    def text(self, text: str) -> list[int]:
        """As ``Words.text``."""
        ids: list[int] = self.renderer.tokenizer(text)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """As ``Words.decode``."""
        text: Any = self.renderer.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def piece(self, token: int) -> tuple[str, list[int]]:
        """As ``Words.piece``."""
        text: Any = self.renderer.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return str(text), list(str(text).encode("utf-8", "replace"))

    def matcher(self, schema: dict[str, Any]) -> Any:
        """As ``Words.matcher``."""
        return json_matcher(self._grammar_tokens, schema)

    @functools.cached_property
    def _grammar_tokens(self) -> Any:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise DataError(
                "response_format: JSON needs an extra: pip install 'halfbyte[serve]'"
            ) from None
        return from_tokenizer(
            self.renderer.tokenizer, n_vocab=self.vocab_size, eos_token=self.renderer.stop_ids[0]
        )


def json_matcher(tokens: Any, schema: dict[str, Any]) -> Any:
    """llguidance's state for a schema.

    Raises:
        DataError: the schema is none, or cannot be followed.
    """
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
        matcher = LLMatcher(tokens, grammar)
    except (ValueError, TypeError) as error:
        raise DataError(f"response_format: {error}") from error
    if matcher.is_error():
        raise DataError(f"response_format: {matcher.get_error()}")
    return matcher
