"""Owns text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
LOOK_BACK = 8  # tokens before the new ones, whose text decides how those begin


class TextStream:
    """Token ids in, text out.

    Text that may yet turn out to be the beginning of a stop string, or the first bytes of a
    character, is held back.

    Args:
        decode: ids to text, control tokens left out.
        stops: strings that end the text; they are not part of it.
        lead: ids before the text, where it goes on with one: some tokenizers drop the first space.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: tuple[str, ...] = (),
        lead: Sequence[int] = (),
    ) -> None:
        self._decode, self._stops = decode, stops
        self._ids = list(lead[-LOOK_BACK:])
        if decode(self._ids).endswith(BROKEN):
            self._ids = []
        self._read = len(self._ids)  # ids whose text is in
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain by now; sets ``stopped`` where a stop string has come."""
        self._ids.append(token)
        self._held += self._new_text(final=False)
        return self._certain()

    def flush(self) -> str:
        """The rest, at the end of an answer."""
        if self.stopped:
            return ""
        self._held += self._new_text(final=True)
        text = self._certain()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _new_text(self, *, final: bool) -> str:
        start = max(0, self._read - LOOK_BACK)
        before = self._decode(self._ids[start : self._read])
        text = self._decode(self._ids[start:])
        if text.endswith(BROKEN) and not final:
            return ""
        self._read = len(self._ids)
        return text[len(before) :]

    def _certain(self) -> str:
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[0]], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
