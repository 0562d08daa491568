"""Owns the codec of a served model: conversations and text to ids, and ids to text."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from halfbyte.data.answer_format import AnswerReader
from halfbyte.data.render import Renderer
from halfbyte.generate.grammar import Grammars
from halfbyte.serve.conversation import Conversation
from halfbyte.serve.text import REPLACEMENT_CHAR

END_TOKENS = 24  # of a prompt, in which a mark of thoughts is looked for
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


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt up to where the answer begins.

    Attributes:
        ids: its tokens.
        tools: JSON text of the tools that may be called; "" for none.
        closer: what ends the thoughts that the prompt has opened; None if it has opened none.
    """

    ids: list[int]
    tools: str = ""
    closer: str | None = None


class ChatCodec:
    """The tokens and chat template of a model, with the same renderer that its run was trained with.

    Args:
        renderer: the model's renderer.
        vocab_size: V of the model's logits.
    """

    def __init__(self, renderer: Renderer, vocab_size: int) -> None:
        self.renderer, self.vocab_size = renderer, vocab_size
        self.stop_ids = frozenset(renderer.stop_ids)
        self.grammars = Grammars(renderer, vocab_size)
        self._pieces: dict[int, tuple[str, bytes]] = {}

    def encode_chat(self, conversation: Conversation) -> ChatPrompt:
        """Return a conversation with the generation prompt.

        Raises:
            DataError: the template refuses the conversation.
        """
        tools = conversation.tools
        ids = self.renderer.encode_prompt(
            conversation.messages, "messages", tools, conversation.options
        )
        end = self.decode_all(ids[-END_TOKENS:]).rstrip()
        marks = self.renderer.answer_format.marks
        closer = next((marks[mark] for mark in marks if end.endswith(mark)), None)
        return ChatPrompt(ids, tools, closer)

    def reader(self, prompt: ChatPrompt) -> AnswerReader:
        """Return what reads an answer to a prompt in its parts."""
        form = self.renderer.answer_format
        return AnswerReader(form, prompt.tools, closer=prompt.closer)

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of plain text."""
        tokens = self.renderer.tokenizer(text, add_special_tokens=add_special_tokens)
        return list(tokens["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without control tokens and with all spaces kept."""
        return str(
            self.renderer.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def decode_all(self, ids: list[int]) -> str:
        """Return the text of ids, control tokens included."""
        tokenizer = self.renderer.tokenizer
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def piece(self, token: int) -> tuple[str, bytes]:
        """Return the text of one token, control tokens included, and its bytes.

        The bytes may be only part of a character.
        """
        if token not in self._pieces:
            self._pieces[token] = self._decode_piece(token)
        return self._pieces[token]

    def _decode_piece(self, token: int) -> tuple[str, bytes]:
        # Decode behind another token: some tokenizers drop the space at the beginning of a text.
        lead = self.decode_all([self._lead_token])
        text = self.decode_all([self._lead_token, token])[len(lead) :]
        if REPLACEMENT_CHAR not in text:
            return text, text.encode()
        name = str(self.renderer.tokenizer.convert_ids_to_tokens(token))
        if BYTE_TOKEN.fullmatch(name):  # SentencePiece's byte fallback
            return text, bytes([int(name[3:5], 16)])
        if all(char in BPE_BYTES for char in name):
            return text, bytes(BPE_BYTES[char] for char in name)
        return text, text.encode()

    @functools.cached_property
    def _lead_token(self) -> int:
        """A token of plain text."""
        return int(self.renderer.tokenizer("a", add_special_tokens=False)["input_ids"][-1])
