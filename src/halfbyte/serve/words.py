"""Owns what a served model reads and writes: conversations and text to ids, ids to text, and grammars."""

from __future__ import annotations

import functools
from typing import Any

from halfbyte.data.render import Renderer
from halfbyte.data.rows import Message
from halfbyte.errors import DataError


class Words:
    """Tokens and template of a model: the very renderer that its run was trained with.

    Args:
        renderer: of the model.
        vocab_size: V of its logits.
    """

    def __init__(self, renderer: Renderer, vocab_size: int) -> None:
        self.renderer, self.vocab_size = renderer, vocab_size
        self.stop_ids = frozenset(renderer.stop_ids)

    def chat(self, messages: tuple[Message, ...]) -> list[int]:
        """Ids of a generation prompt.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self.renderer.encode_prompt(messages, "messages")

    def text(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self.renderer.tokenizer(text)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens left out, spaces kept."""
        return str(
            self.renderer.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def piece(self, token: int) -> str:
        """One token as text, control tokens too."""
        return str(self.renderer.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def matcher(self, schema: dict[str, Any]) -> Any:
        """A grammar's state for answers of a JSON schema (llguidance's).

        Raises:
            DataError: it is no schema, or cannot be followed.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
            matcher = LLMatcher(self._grammar_tokens, grammar)
        except (ValueError, TypeError) as error:
            raise DataError(f"response_format: {error}") from error
        if matcher.is_error():
            raise DataError(f"response_format: {matcher.get_error()}")
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        for token in self.stop_ids:
            allowed &= ~(1 << token)
        if not allowed:  # such as a schema that is its own only definition
            raise DataError("response_format: no JSON fits this schema")
        return matcher

    @functools.cached_property
    def _grammar_tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(
            self.renderer.tokenizer, n_vocab=self.vocab_size, eos_token=self.renderer.stop_ids[0]
        )
