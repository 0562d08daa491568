"""Owns what a chat template and its tokenizer do: which tokens mark turns, and how an answer ends."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.config.paths import TEMPLATE_NAMES
from halfbyte.data.chat_template import ChatTemplate
from halfbyte.data.conversation import Message, ToolCall
from halfbyte.data.special_tokens import SpecialTokens, pattern_of
from halfbyte.data.tokenise import plain_ids
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "chat template"
PROBE = (
    Message("user", "alpha"),
    Message("assistant", "beta"),
    Message("user", "gamma delta"),
    Message("assistant", "epsilon zeta"),
)
TOOLS = (
    '[{"type": "function", "function": {"name": "eta", "description": "theta", "parameters":'
    ' {"type": "object", "properties": {"iota": {"type": "string"}}}}}]'
)
TOOL_PROBE = (
    Message("user", "alpha"),
    Message("assistant", "", tool_calls=(ToolCall("eta", '{"iota": "kappa"}', "call00001"),)),
    Message("tool", "lambda", tool_call_id="call00001", name="eta"),
    Message("assistant", "epsilon zeta"),
)
# Names of tokens that mark turns, the ends of texts or bytes, in whatever template: an answer never has them.
MARK_NAMES = re.compile(
    r"turn|im_(start|end)|header|(start|begin|end).?of|endoftext|eo[tms]|user|assistant|system|0x[0-9A-F]{2}",
    re.IGNORECASE,
)
# An added token is a control token if it looks like the first, and markup of a template that writes it if it
# looks like the second; others are words that the vocabulary was given.
PIPED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
MARKUP = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)


class ChatFormat:
    """How a chat template marks turns, and how an answer ends.

    Args:
        template: the template.
        stop: ``template`` if the template ends answers, ``eos`` if the EOS token is to be added.
        vocabulary: added tokens that are words of texts, whatever they look like.

    Attributes:
        special_tokens: the tokens that text of a conversation must not turn into.
        stops: special-token texts that end an answer, the usual one first.

    Raises:
        DataError: an answer ends without a token that a model could stop at.
    """

    def __init__(
        self, template: ChatTemplate, stop: str = "template", vocabulary: Sequence[str] = ()
    ) -> None:
        self.template, self.tokenizer = template, template.tokenizer
        piped = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        piped = {token for token in piped - {*vocabulary} if PIPED.fullmatch(token)}
        tokens = {*always_special(self.tokenizer), *piped}
        text = self._probe()
        known = _written(self.tokenizer, template.source, text)
        strings = {*tokens, *known}
        self.special_tokens = SpecialTokens(strings, self.tokenizer)
        named = {token for token in strings if MARK_NAMES.search(token)}
        # A special token that the template does not know is no markup of its answers: SmolLM2's <filename>.
        unknown = tokens - known
        marks = {*named, *unknown, *_framing(self.tokenizer), *self._turn_marks()}
        # Added to the last answer where the template writes no stop: after a text, and after a tool call.
        self._missing: tuple[str, str] | None = None
        self.stops = [self._usual_stop(text, stop)]
        marks |= self._inspect_tools()
        marks |= set(self.stops)
        self._stop_pattern = pattern_of(self.stops)
        self.special_tokens = SpecialTokens(strings, self.tokenizer, marks)

    def with_options(self, options: Mapping[str, Any]) -> ChatFormat:
        """Return a copy whose template is given further variables."""
        if not options:
            return self
        form = copy.copy(self)
        form.template = self.template.with_options(options)
        return form

    def end_of_answer(self, text: str, start: int) -> int | None:
        """Return where the answer that begins at ``start`` ends, after its stop token; None if it has none."""
        stop = self._stop_pattern.search(text, start)
        return stop.end() if stop else None

    def is_over(self, text: str, end: int) -> bool:
        """Return whether nothing but space and special tokens stands in a text from ``end`` on."""
        return not self.special_tokens.pattern.sub("", text[end:]).strip()

    def with_stop(self, text: str, answer: Message) -> str:
        """Return a text that ends with an answer, with the stop token added that the template leaves out."""
        if self._missing is None:
            return text
        return text.rstrip() + self._missing[bool(answer.tool_calls)]

    def _probe(self) -> str:
        """Return the text of the probe, with contents as the template takes them.

        Raises:
            DataError: the template does not write them either way.
        """
        for as_parts in (False, True):
            self.template.content_as_parts = as_parts
            with contextlib.suppress(DataError):
                text = self.template.render(PROBE, PLACE)
                if PROBE[0].content in text:
                    return text
        self.template.content_as_parts = False
        return self.template.render(PROBE, PLACE)  # raises what is wrong with text

    def _turn_marks(self) -> set[str]:
        """Return the special tokens that mark a user's turn, and the one that begins an assistant's."""
        find = self.special_tokens.pattern.findall
        prompt = self.template.prompt(PROBE[:1], PLACE)
        try:
            question = self.template.render(PROBE[:1], PLACE)
            # A template's own system message may speak of the marks of thoughts; later turns do not.
            follows = _after(self.template.render(PROBE[:3], PLACE), PROBE[1].content)
        except DataError:  # a template may want an answer
            return set(find(prompt))
        return {*self._run(question), *find(follows), *find(_rest(prompt, question))[:1]}

    def _run(self, text: str) -> list[str]:
        """Return the special tokens that a text begins with, with nothing between them."""
        found = []
        while match := self.special_tokens.pattern.match(text):
            found.append(match.group())
            text = text[match.end() :]
        return found

    def _usual_stop(self, text: str, stop: str) -> str:
        """Return the special token that ends an answer in ``text``, the probe's.

        Raises:
            DataError: none does, or ``eos`` would add one to another.
        """
        after = _after(text, PROBE[-1].content)
        eos: str | None = self.tokenizer.eos_token
        ends = self._run(after.lstrip())
        if ends:
            # What ends every answer, and not only the last of a conversation.
            always = self._run(text.partition(PROBE[1].content)[2].lstrip())
            ends = [one for one, other in zip(ends, always, strict=False) if one == other] or ends
            usual = eos if eos in ends else ends[-1]
            if stop == "eos":
                raise DataError(
                    f"data.stop: eos has no effect, since the chat template ends answers with {usual};"
                    " leave it out"
                )
            return usual
        if stop == "eos" and eos is not None:
            self._missing = (eos, eos)
            return eos
        # The mark of the next turn can end an answer, if there is one: generation stops at it.
        gap = _after(text, PROBE[1].content)
        match = self.special_tokens.pattern.match(gap.lstrip())
        if match:
            space = gap[: len(gap) - len(gap.lstrip())]
            self._missing = (space + match.group(), space + match.group())
            return match.group()
        raise DataError(
            f"chat template: an assistant turn ends with {after[:60]!r}, which holds no special token of"
            " this tokenizer, so the model could not learn to stop. Set data.stop=eos to end answers"
            f" with the EOS token ({eos}), add the template's marks as data.new_tokens, or name another data.chat_template"
            f" ({', '.join(TEMPLATE_NAMES)})"
        )

    def _inspect_tools(self) -> set[str]:
        """Find how calls take their arguments and how they end; return the marks of a tool's turn."""
        if not self.template.knows_tools:
            return set()
        for as_text in (False, True):
            self.template.calls_as_text = as_text
            try:
                call = self.template.render(TOOL_PROBE[:2], PLACE, TOOLS)
                output = self.template.render(TOOL_PROBE[:3], PLACE, TOOLS)
            except DataError:
                continue
            if "kappa" not in call:
                break
            if not as_text and "'kappa'" in call:  # Python's repr of an object
                continue
            # In JSON within JSON, quotes are escaped: such a template writes the arguments itself.
            return self._note_call(call, output)
        self.template.calls_as_text = False
        return set()

    def _note_call(self, call: str, output: str) -> set[str]:
        """Note the token that ends a call; return the mark that begins the tool's turn.

        Args:
            call: a conversation that ends with a call.
            output: the same with the tool's turn. Where a template leaves earlier thoughts out, it does not
                begin with ``call``.
        """
        find = self.special_tokens.pattern.findall
        ends_call = find(_after(call, "kappa"))
        begins = find(_after(output, "kappa"))[len(ends_call) :][:1] if "kappa" in output else []
        if self._missing is None:
            last = find(call)[-1:]
            if last and call.rstrip().endswith(last[0]) and not last[0].startswith(("</", "[/")):
                self.stops += [token for token in last if token not in self.stops]
        elif begins and self._missing[0].strip() != self.tokenizer.eos_token:
            self._missing = (self._missing[0], begins[0])
            self.stops += [token for token in begins if token not in self.stops]
        return set(begins)


def always_special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the tokens that a tokenizer calls special."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return added + _framing(tokenizer)


def _framing(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of BOS, EOS, padding and unknown text."""
    tokens = (
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.unk_token,
    )
    return [str(token) for token in tokens if token]


def _written(tokenizer: PreTrainedTokenizerBase, source: str, text: str) -> set[str]:
    """Return the added tokens that a template writes: markup in its source, and tokens of its text."""
    ids = set(plain_ids(tokenizer, [text])[0])
    added = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        # Gemma lists runs of newlines among its added tokens; they are text all the same.
        if str(token).strip()
    }
    return {
        token
        for token, index in added.items()
        if (token in text and index in ids) or (token in source and MARKUP.fullmatch(token))
    }


def _after(text: str, content: str) -> str:
    """Return what follows the content of a probe's turn.

    Raises:
        DataError: the template does not write the content.
    """
    _, content, rest = text.partition(content)
    if not content:
        raise DataError(f"chat template: it does not write the content of a turn: {text[:60]!r}")
    return rest


def _rest(text: str, start: str) -> str:
    """Return ``text`` from where it differs from ``start``."""
    shorter = min(len(text), len(start))
    return text[next((n for n in range(shorter) if text[n] != start[n]), shorter) :]
