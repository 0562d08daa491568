"""Owns what a chat template and its tokenizer do: which tokens mark turns, and how an answer ends."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

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
# An added token is markup if it looks like this; others are words that the vocabulary was given.
MARKUP = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)


class ChatFormat:
    """How a chat template marks turns, and how an answer ends.

    Args:
        template: the template.
        stop: ``template`` if the template ends answers, ``eos`` if the EOS token is to be added.

    Attributes:
        special_tokens: the tokens that text of a conversation must not turn into.
        stops: special-token texts that end an answer, the usual one first.

    Raises:
        DataError: an answer ends without a token that a model could stop at.
    """

    def __init__(self, template: ChatTemplate, stop: str = "template") -> None:
        self.template, self.tokenizer = template, template.tokenizer
        tokens = always_special(self.tokenizer)
        text = self._probe()
        known = _written(self.tokenizer, template.source, text)
        strings = {*tokens, *known}
        self.special_tokens = SpecialTokens(strings, self.tokenizer)
        named = {token for token in strings if MARK_NAMES.search(token)}
        # A special token that the template does not know is no markup of its answers: SmolLM2's <filename>.
        unknown = set(tokens) - known
        marks = {*named, *unknown, *_framing(self.tokenizer), *self._turn_marks()}
        # Added to the last answer where the template writes no stop: after a text, and after a tool call.
        self._missing: tuple[str, str] | None = None
        self.stops = [self._usual_stop(text, stop)]
        marks |= self._inspect_tools()
        marks |= set(self.stops)
        self._stop_pattern = pattern_of(self.stops)
        self.special_tokens = SpecialTokens(strings, self.tokenizer, marks)

    def end_of_answer(self, text: str, start: int) -> int | None:
        """Return where the answer that begins at ``start`` ends, after its stop token; None if it has none."""
        stop = self._stop_pattern.search(text, start)
        return stop.end() if stop else None

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
        except DataError:  # a template may want an answer
            return set(find(prompt))
        return {*find(question), *find(_rest(prompt, question))[:1]}

    def _usual_stop(self, text: str, stop: str) -> str:
        """Return the special token that ends an answer in ``text``, the probe's.

        Raises:
            DataError: none does, or ``eos`` would add one to another.
        """
        after = _after(text, PROBE[-1].content)
        match = self.special_tokens.pattern.match(after.lstrip())
        if match:
            if stop == "eos":
                raise DataError(
                    f"data.stop: eos has no effect, since the chat template ends answers with"
                    f" {match.group()}; leave it out"
                )
            return match.group()
        eos: str | None = self.tokenizer.eos_token
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
            f" with the EOS token ({eos}), add it to data.new_tokens, or name another data.chat_template"
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
                output = _rest(self.template.render(TOOL_PROBE[:3], PLACE, TOOLS), call)
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
        """Note the token that ends a call; return the mark that begins the tool's turn."""
        find = self.special_tokens.pattern.findall
        begins = find(output)[:1]
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
