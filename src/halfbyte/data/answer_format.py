"""Owns reading an answer as its chat template writes one: thoughts, text and tool calls, whole or as it streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from halfbyte.data.answers import samples_of
from halfbyte.data.call_format import json_or_none, schemas_of
from halfbyte.data.call_probe import call_format
from halfbyte.data.chat_format import PLACE, ChatFormat
from halfbyte.data.conversation import Message, ToolCall, tools_of
from halfbyte.data.thoughts import MARKS
from halfbyte.errors import DataError

ENDS_OF_CALLS = (">", "}", "]", ")")  # the last characters of all calls
THOUGHT, REPLY = "sigma_q7", "omega_q7"  # in a probe


class Piece(NamedTuple):
    """What an answer goes on with: text of its thoughts, text of its content, or a call."""

    kind: Literal["thoughts", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


@dataclass
class ParsedAnswer:
    """An answer in its parts.

    Attributes:
        thoughts: its thoughts, None if it has none.
        content: its text, without thoughts and calls.
        calls: the tools that it calls.
        malformed: whether it begins a call that cannot be read, which stays in its content.
    """

    thoughts: str | None = None
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    malformed: bool = False

    def add(self, piece: Piece) -> None:
        """Append what comes next."""
        if piece.call is not None:
            self.calls.append(piece.call)
        elif piece.kind == "thoughts":
            self.thoughts = (self.thoughts or "") + piece.text
        else:
            self.content += piece.text


class AnswerFormat:
    """How answers of one chat template are written.

    Args:
        form: the template; None for a tokenizer without one, whose answers are text.
        opener: what its prompts end with, where they open the thoughts, so that an answer begins within them.

    Attributes:
        closer: what ends such thoughts; None where prompts open none.
        marks: what closes thoughts, by what opens them.
        own_marks: what the template itself opens and closes them with; None if it writes none.
        spaces: white space that it writes before the text of an answer, and behind it.
        calls: how it writes calls; None if it writes none, or in no way that is known.
    """

    def __init__(self, form: ChatFormat | None, opener: str | None = None) -> None:
        own = _thought_marks(form) if form else {}
        self.own_marks = next(iter(own.items()), None)
        self.marks = {**own, **MARKS}
        self.closer = self.marks[opener] if opener else None
        self.spaces = _spaces(form) if form else ("", "")
        self.calls = call_format(form) if form else None

    def parse(self, text: str, tools: str = "") -> ParsedAnswer:
        """Return the parts of a whole answer.

        Args:
            text: what was generated, with markup and without its stop token.
            tools: JSON text of the tools that it may call; without any, markup of calls is text.
        """
        parsed = ParsedAnswer()
        reader = AnswerReader(self, tools, closer=self.closer)
        for piece in [*reader.push(text), *reader.flush()]:
            parsed.add(piece)
        parsed.malformed = reader.malformed
        return parsed


class AnswerReader:
    """Reads one answer as it streams.

    Text is held back while it may be the beginning of a mark, and a call until it is whole.

    Args:
        form: the template's format.
        tools: JSON text of the tools that may be called, "" for none.
        closer: what ends the thoughts that the prompt has opened; None if it has opened none.

    Attributes:
        malformed: whether a call was begun that cannot be read; it is given as text at the end.
        num_calls: number of calls so far.
    """

    def __init__(self, form: AnswerFormat, tools: str = "", *, closer: str | None = None) -> None:
        self.form = form
        self.schemas: Mapping[str, Any] = schemas_of(tools_of(tools)) if tools else {}
        self.state = "start" if closer is None else "thoughts"
        self.malformed = False
        self.num_calls = 0
        self._closer = closer or ""  # of the thoughts that are open
        self._buffer = ""
        self._has_content = False
        self._num_given = 0  # of the calls in the buffer
        self._latest = ""  # what came last
        self._gap = ""  # space between the content and what may be a call
        self._trims = closer is not None  # whether space at the beginning of what comes is left out

    @property
    def num_held(self) -> int:
        """Number of characters that are held back."""
        return len(self._buffer)

    def push(self, text: str) -> list[Piece]:
        """Add text and return what is certain now."""
        self._buffer += text
        self._latest = text
        pieces: list[Piece] = []
        state = None
        while state != self.state:
            state = self.state
            pieces += getattr(self, f"_{state}")()
        return pieces

    def flush(self) -> list[Piece]:
        """Return the rest at the end of the answer."""
        pieces = []
        if self.state == "calls":
            pieces += self._calls(ended=True)
            mark = (self.form.calls.trigger if self.form.calls else "") or ("{", "[")
            self.malformed |= self._buffer.lstrip().startswith(mark)
        rest = self._trimmed(self._buffer)
        if self.state in ("thoughts", "calls"):
            rest = rest.rstrip()
        self._buffer = ""
        if rest:
            pieces.append(Piece("thoughts" if self.state == "thoughts" else "content", rest))
        return pieces

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text

    def _emit(self, kind: Literal["thoughts", "content"], size: int) -> list[Piece]:
        """Take the first ``size`` characters off the buffer, but for the space at their end."""
        text = self._buffer[:size].rstrip()
        self._buffer = self._buffer[len(text) :]
        text = self._trimmed(text)
        self._has_content |= bool(text) and kind == "content"
        return [Piece(kind, text)] if text else []

    def _opener(self) -> str | None:
        """Return the mark of thoughts that the buffer begins with, if it does."""
        begun = self._buffer.lstrip()
        return next((mark for mark in self.form.marks if begun.startswith(mark)), None)

    def _start(self) -> list[Piece]:
        begun, opener = self._buffer.lstrip(), self._opener()
        if opener is not None:
            self._closer = self.form.marks[opener]
            self._buffer, self.state, self._trims = begun[len(opener) :], "thoughts", True
        elif begun and not any(mark.startswith(begun) for mark in self.form.marks):
            self.state = "content"
        return []

    def _thoughts(self) -> list[Piece]:
        opener = self._opener() if self._trims else None
        if opener is not None:  # though the prompt has opened them
            self._buffer = self._buffer.lstrip()[len(opener) :]
        at = self._buffer.find(self._closer)
        if at < 0:
            return self._emit("thoughts", len(self._buffer) - self._held(self._closer))
        rest = self._buffer[at + len(self._closer) :]
        pieces = self._emit("thoughts", at)
        self._buffer, self.state, self._trims = rest, "start", True  # another block may follow
        return pieces

    def _content(self) -> list[Piece]:
        calls = self.form.calls if self.schemas else None
        if calls is None:
            text, self._buffer = self._trimmed(self._buffer), ""
            return [Piece("content", text)] if text else []
        at = self._buffer.find(calls.trigger) if calls.trigger else self._bare_call()
        if at < 0:
            return self._emit("content", len(self._buffer) - self._held(calls.trigger))
        pieces = self._emit("content", at)
        begun = self._buffer.lstrip()
        self._gap = self._buffer[: len(self._buffer) - len(begun)] if self._has_content else ""
        self._buffer, self.state = begun, "calls"
        return pieces

    def _bare_call(self) -> int:
        """Return where calls begin that no mark announces: at the beginning of the answer, or nowhere (-1)."""
        begun = self._buffer.lstrip()
        if self._has_content or not begun:
            return -1
        begins = begun.startswith(("{", "[")) or self._may_be_call()
        return len(self._buffer) - len(begun) if begins else -1

    def _calls(self, *, ended: bool = False) -> list[Piece]:
        assert self.form.calls is not None
        if not ended and not any(char in self._latest for char in ENDS_OF_CALLS):
            return []
        made, end = self.form.calls.read(self._buffer, 0, self.schemas, ended=ended)
        pieces = [Piece("call", call=call) for call in made[self._num_given :]]
        self.num_calls += len(pieces)
        self._num_given = max(self._num_given, len(made))
        rest, trigger = self._buffer[end:], self.form.calls.trigger
        is_broken = ended or not rest.startswith(trigger)
        # Where another call begins behind what cannot be read, that is text.
        following = rest.find(trigger, len(trigger) if rest.startswith(trigger) else 0)
        if trigger and is_broken and following > 0 and not rest[:following].isspace():
            self.malformed |= rest.startswith(trigger)
            gap = self._gap if not end else ""
            pieces.append(Piece("content", gap + rest[:following].strip()))
            self._buffer, self._num_given, self._gap = rest[following:], 0, "\n"
            return pieces + self._calls(ended=ended)
        if ended:
            self._buffer, self._trims = rest if end else self._gap + rest, bool(end)
        elif not trigger and not made and not self._may_be_call():
            self.state, self._has_content = "content", True
        return pieces

    def _may_be_call(self) -> bool:
        """Return whether the buffer may go on to be a call that no mark announces."""
        begun = self._buffer.lstrip()
        if begun.startswith(("{", "[")):
            return json_or_none(begun) is None
        names = [name for name in self.schemas if begun.startswith(name) or name.startswith(begun)]
        return any(begun[len(name) :].lstrip()[:1] in ("", "{", "<", "[") for name in names)

    def _held(self, mark: str) -> int:
        """Return how many characters at the end of the buffer may be the beginning of a mark."""
        sizes = range(min(len(mark) - 1, len(self._buffer)), 0, -1)
        return next((size for size in sizes if self._buffer.endswith(mark[:size])), 0)


def _written(form: ChatFormat, answer: Message) -> str:
    """Return what a template writes of an answer; "" if it takes none like this."""
    try:
        (sample, *_) = samples_of(form, (Message("user", "alpha"), answer), [1], PLACE, "")
    except DataError:
        return ""
    span = sample.spans[-1]
    return sample.text[span.start : span.end]


def _spaces(form: ChatFormat) -> tuple[str, str]:
    """Return the white space that a template writes before the text of an answer, and behind it."""
    before, _, after = _written(form, Message("assistant", REPLY)).partition(REPLY)
    after = form.special_tokens.split(after)[0]
    return "" if before.strip() else before, "" if after.strip() else after


def _thought_marks(form: ChatFormat) -> dict[str, str]:
    """Return the marks between which a template writes thoughts; none if it writes none."""
    answer = Message("assistant", REPLY, reasoning=THOUGHT)
    opener, thought, rest = _written(form, answer).partition(THOUGHT)
    closer = rest.partition(REPLY)[0].strip()
    opener = opener.strip()
    return {opener: closer} if thought and opener and closer else {}
