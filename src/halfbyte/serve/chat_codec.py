"""Owns the codec of a served model: conversations and text to ids, ids to text, and grammars."""

from __future__ import annotations

import functools
import re
from typing import Any

from halfbyte.data.conversation import Message
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError
from halfbyte.serve.text import REPLACEMENT_CHAR

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _bytes_of_chars() -> dict[str, int]:
    """Map the characters with which byte-level BPE writes bytes to those bytes.

    Visible Latin-1 characters stand for themselves, other bytes for characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    shown = {chr(byte): byte for byte in visible}
    return shown | {chr(0x100 + number): byte for number, byte in enumerate(others)}


BPE_BYTES = _bytes_of_chars()


class ChatCodec:
    """The tokens and chat template of a model, with the same renderer that its run was trained with.

    Args:
        renderer: the model's renderer.
        vocab_size: V of the model's logits.
    """

    def __init__(self, renderer: Renderer, vocab_size: int) -> None:
        self.renderer, self.vocab_size = renderer, vocab_size
        self.stop_ids = frozenset(renderer.stop_ids)
        self._pieces: dict[int, tuple[str, bytes]] = {}

    def encode_chat(self, messages: tuple[Message, ...]) -> list[int]:
        """Return the ids of a conversation with the generation prompt.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self.renderer.encode_prompt(messages, "messages")

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text."""
        return list(self.renderer.tokenizer(text)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without control tokens and with all spaces kept."""
        return str(
            self.renderer.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def piece(self, token: int) -> tuple[str, bytes]:
        """Return the text of one token, control tokens included, and its bytes.

        The bytes may be only part of a character.
        """
        if token not in self._pieces:
            self._pieces[token] = self._decode_piece(token)
        return self._pieces[token]

    def _decode_piece(self, token: int) -> tuple[str, bytes]:
        tokenizer = self.renderer.tokenizer

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        # Decode behind another token: some tokenizers drop the space at the beginning of a text.
        lead = decode([self._lead_token])
        text = decode([self._lead_token, token])[len(lead) :]
        if REPLACEMENT_CHAR not in text:
            return text, text.encode()
        name = str(tokenizer.convert_ids_to_tokens(token))
        if BYTE_TOKEN.fullmatch(name):  # SentencePiece's byte fallback
            return text, bytes([int(name[3:5], 16)])
        if all(char in BPE_BYTES for char in name):
            return text, bytes(BPE_BYTES[char] for char in name)
        return text, text.encode()

    @functools.cached_property
    def _lead_token(self) -> int:
        """A token of plain text."""
        return int(self.renderer.tokenizer("a", add_special_tokens=False)["input_ids"][-1])

    def matcher(self, schema: dict[str, Any]) -> Any:
        """Return llguidance's state of a grammar for answers that follow a JSON schema.

        Raises:
            DataError: it is not a valid schema, or no answer can follow it.
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
        if not allowed:  # for example a schema that refers only to itself
            raise DataError("response_format: no JSON value matches this schema")
        return matcher

    @functools.cached_property
    def _grammar_tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(
            self.renderer.tokenizer, n_vocab=self.vocab_size, eos_token=self.renderer.stop_ids[0]
        )
