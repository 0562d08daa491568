"""Owns what a served model reads and writes: conversations and text to ids, ids to text, and grammars."""

from __future__ import annotations

import functools
import re
from typing import Any

from halfbyte.data.render import Renderer
from halfbyte.data.rows import Message
from halfbyte.errors import DataError
from halfbyte.serve.text import BROKEN

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _byte_of_char() -> dict[str, int]:
    """How byte-level BPE writes bytes: visible Latin-1 characters as they are, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    shown = {chr(byte): byte for byte in visible}
    return shown | {chr(0x100 + number): byte for number, byte in enumerate(others)}


BYTES = _byte_of_char()


class Words:
    """Tokens and template of a model: the very renderer that its run was trained with.

    Args:
        renderer: of the model.
        vocab_size: V of its logits.
    """

    def __init__(self, renderer: Renderer, vocab_size: int) -> None:
        self.renderer, self.vocab_size = renderer, vocab_size
        self.stop_ids = frozenset(renderer.stop_ids)
        self._pieces: dict[int, tuple[str, bytes]] = {}

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

    def piece(self, token: int) -> tuple[str, bytes]:
        """One token as text, control tokens too, and its bytes, which may be half a character."""
        if token not in self._pieces:
            self._pieces[token] = self._piece(token)
        return self._pieces[token]

    def _piece(self, token: int) -> tuple[str, bytes]:
        tokenizer = self.renderer.tokenizer

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        # Behind another token: some tokenizers drop the space that a text begins with.
        lead = decode([self._anchor])
        text = decode([self._anchor, token])[len(lead) :]
        if BROKEN not in text:
            return text, text.encode()
        name = str(tokenizer.convert_ids_to_tokens(token))
        if BYTE.fullmatch(name):  # SentencePiece's byte fallback
            return text, bytes([int(name[3:5], 16)])
        if all(char in BYTES for char in name):
            return text, bytes(BYTES[char] for char in name)
        return text, text.encode()

    @functools.cached_property
    def _anchor(self) -> int:
        """A token of plain text."""
        return int(self.renderer.tokenizer("a", add_special_tokens=False)["input_ids"][-1])

    def matcher(self, schema: dict[str, Any]) -> Any:
        """A grammar's state for answers of a JSON schema (llguidance's).

        Raises:
            DataError: it is no schema, or cannot be followed.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
            matcher = LLMatcher(self._grammar_tokens, grammar, log_level=0)
        except (ValueError, TypeError) as error:
            raise DataError(f"response_format: {error}") from error
        if matcher.is_error():
            raise DataError(f"response_format: {matcher.get_error()}")
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise DataError(f"response_format: {matcher.get_error()}")
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
