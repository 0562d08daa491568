"""Owns streamed text: only whole characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from halfbyte.data.answer_format import AnswerReader

REPLACEMENT_CHAR = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
CONTEXT_TOKENS = 8  # decoded before the new tokens, as they decide how the new text begins


class TextStream:
    """Turn token ids into text, one token at a time.

    Text is held back while it may still turn out to be the beginning of a stop string, or only the first
    bytes of a character.

    Args:
        decode: turns ids into text and leaves out control tokens.
        stops: strings that end the text and are not part of it.
        lead: ids that precede the text when it continues a prompt: some tokenizers drop the first space.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: tuple[str, ...] = (),
        lead: Sequence[int] = (),
    ) -> None:
        self._decode, self._stops = decode, stops
        self._ids = list(lead[-CONTEXT_TOKENS:])
        if decode(self._ids).endswith(REPLACEMENT_CHAR):
            self._ids = []
        self._num_decoded = len(self._ids)
        self._held_back = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain; set ``stopped`` at a stop string."""
        self._ids.append(token)
        self._held_back += self._new_text(final=False)
        return self._release()

    def flush(self) -> str:
        """Return the remaining text at the end of an answer."""
        if self.stopped:
            return ""
        self._held_back += self._new_text(final=True)
        text = self._release()
        if not self.stopped:
            text, self._held_back = text + self._held_back, ""
        return text

    def _new_text(self, *, final: bool) -> str:
        start = max(0, self._num_decoded - CONTEXT_TOKENS)
        before = self._decode(self._ids[start : self._num_decoded])
        text = self._decode(self._ids[start:])
        if text.endswith(REPLACEMENT_CHAR) and not final:
            return ""
        self._num_decoded = len(self._ids)
        return text[len(before) :]

    def _release(self) -> str:
        """Return what is certain of the text that was held back, up to a stop string."""
        matches = [(at, stop) for stop in self._stops if (at := self._held_back.find(stop)) >= 0]
        if matches:
            self.stopped = True
            text, self._held_back = self._held_back[: min(matches)[0]], ""
            return text
        keep = max((_overlap(self._held_back, stop) for stop in self._stops), default=0)
        text, self._held_back = (
            self._held_back[: len(self._held_back) - keep],
            self._held_back[len(self._held_back) - keep :],
        )
        return text


class AnswerStream(TextStream):
    """The stream of a chat's answer, in which stop strings end the content alone, not thoughts or calls.

    Args:
        decode: as for ``TextStream``.
        stops: as for ``TextStream``.
        reader: reads the answer in its parts.
        one_call: whether the answer ends behind its first call.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: tuple[str, ...],
        reader: AnswerReader,
        *,
        one_call: bool = False,
    ) -> None:
        super().__init__(decode, stops)
        self._reader, self._one_call = reader, one_call

    def push(self, token: int) -> str:
        """As ``TextStream.push``."""
        self._ids.append(token)
        return self._read(self._new_text(final=False))

    def _read(self, new: str) -> str:
        was_content = self._reader.state == "content"
        pieces = self._reader.push(new)
        if self._reader.state != "content":
            text, self._held_back = self._held_back + new, ""
            self.stopped = self._one_call and self._reader.num_calls > 0
            return text
        markup = ""
        if not was_content:  # what the content begins with may be a part of the new text
            begun = "".join(piece.text for piece in pieces if piece.kind == "content")
            size = len(begun) + self._reader.num_held
            markup, new = new[: len(new) - size], new[len(new) - size :]
        self._held_back += new
        return markup + self._release()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
