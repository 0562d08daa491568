"""Owns a chat template as it is run: its text with the run's date, and the keys in which it takes a turn."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import date
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.bounds import BoundError, bounded, read_text, shorten
from halfbyte.config.paths import TEMPLATE_NAMES
from halfbyte.data.conversation import OPENING_ROLES, Message, ToolCall, tools_of
from halfbyte.data.fields import RowError
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOCK_CALL = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
CLOCK_NAME = re.compile(r"strftime_now(?!\s+is\s)")
CLOCK_MACRO = "{%- macro strftime_now(format) -%}"
DATE_CODES = "dmyYBbhAajHIMSpFDc"  # those that a macro writes
# Variables of templates that transformers and the tokenizer give, or that no caller may set.
GIVEN = re.compile(
    r"messages|tools|documents|add_generation_prompt|continue_final_message|\w+_tokens?|strftime_now|raise_exception"
    r"|range|namespace|dict|lipsum|cycler|joiner|loop"
)
# Names under which templates take thoughts that are a field of their own.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MAX_REASON_CHARS = 120
# Far beyond published templates, of which the longest have 25,000 characters and take milliseconds.
MAX_TEMPLATE_CHARS = 500_000
MAX_RENDER_S = 1.0
MAX_RENDER_BYTES = 1 << 29
# How JSON in ASCII writes the characters that stand for special tokens while the template runs.
ESCAPED_SENTINEL = re.compile(r"\\+udb[89ab][0-9a-f]\\+ud[c-f]", re.IGNORECASE)


def load_template(name: str) -> str:
    """Return the Jinja text of a named template or of a file.

    Raises:
        DataError: the file cannot be read.
    """
    if name in TEMPLATE_NAMES:
        return (
            resources.files("halfbyte.data").joinpath(f"templates/{name}.jinja").read_text("utf-8")
        )
    try:
        return read_text(Path(name), MAX_TEMPLATE_CHARS)
    except (OSError, ValueError) as error:
        raise DataError(f"data.chat_template: {name} cannot be read: {error}") from None


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's own chat template: of several that it names, the one named default.

    Raises:
        DataError: it names several, none of them default.
    """
    template: Any = tokenizer.chat_template
    if not isinstance(template, dict):
        return None if template is None else str(template)
    if "default" not in template:
        raise DataError(
            f"the tokenizer has the chat templates {', '.join(template)}, and none is named default;"
            " write one into a .jinja file and set data.chat_template to it"
        )
    return str(template["default"])


def with_date(template: str, day: date) -> str:
    """Return a template that writes ``day`` wherever it would write today's date.

    A run keeps its day, so that evaluation, serving and exports see the text that it was trained on.
    """
    if template.startswith(CLOCK_MACRO):
        return template  # dated already
    dated = CLOCK_CALL.sub(lambda call: json.dumps(day.strftime(call.group(2))), template)
    if not CLOCK_NAME.search(dated):
        return dated
    # A format that the template computes: a macro of the same name writes the day.
    codes = {f"%{code}": day.strftime(f"%{code}") for code in DATE_CODES}
    codes = {f"%-{code[1:]}": text.lstrip("0") or "0" for code, text in codes.items()} | codes
    filters = "".join(
        f" | replace({json.dumps(code)}, {json.dumps(codes[code])})" for code in codes
    )
    return f"{CLOCK_MACRO}{{{{ format{filters} }}}}{{%- endmacro -%}}{dated}"


def template_sha256(template: str | None) -> str:
    """Return the sha256 of a chat template, which identifies it in the manifest."""
    return hashlib.sha256((template or "").encode()).hexdigest()


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: runs the template that it has.

    Raises:
        DataError: the template is too long.

    Attributes:
        calls_as_text: whether the template takes the arguments of tool calls as JSON text.
        content_as_parts: whether the template takes a content as a list of parts alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.calls_as_text = False
        self.content_as_parts = False
        self.source = str(tokenizer.chat_template or "")
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise DataError(
                f"the chat template has {len(self.source):,} characters; allowed: {MAX_TEMPLATE_CHARS:,}."
                " Write a shorter one into a .jinja file and set data.chat_template to it"
            )
        self._reasoning_keys = [
            key for key in REASONING_KEYS if re.search(rf"(\.|['\"]){key}\b", self.source)
        ]
        self._options: Mapping[str, Any] = {}
        self._thinks_in_content = not self._reasoning_keys and "</think>" in self.source

    @property
    def knows_tools(self) -> bool:
        """Whether the template mentions tools at all."""
        return "tool" in self.source

    def reads(self, variable: str) -> bool:
        """Return whether the template reads a variable that a caller may set, such as ``enable_thinking``."""
        if not variable.isidentifier() or GIVEN.fullmatch(variable):
            return False
        return re.search(rf"\b{variable}\b", self.source) is not None

    def with_options(self, options: Mapping[str, Any]) -> ChatTemplate:
        """Return a copy that gives the template further variables."""
        template = copy.copy(self)
        template._options = options
        return template

    def render(
        self,
        messages: tuple[Message, ...],
        place: str,
        tools: str = "",
        *,
        generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation, with ``generation_prompt`` up to where the next answer begins.

        Args:
            messages: the conversation.
            place: where it comes from, for errors.
            tools: JSON text of the tools that may be called, "" for none.
            generation_prompt: whether to end where an assistant's answer begins.

        Raises:
            RowError: the template rejects the conversation.
        DataError: the template takes too long, or too much memory.
        """
        options = {**self._options, **({"tools": tools_of(tools)} if tools else {})}
        try:
            with bounded(MAX_RENDER_S, MAX_RENDER_BYTES):
                text: Any = self.tokenizer.apply_chat_template(
                    self.turns(messages),
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **options,
                )
        except BoundError as error:
            raise DataError(
                f"{place}: the chat template {error} for this conversation; use another template"
                " (data.chat_template), or split the row"
            ) from None
        except Exception as error:  # Jinja's errors and the template's raise_exception
            why = shorten(str(error), MAX_REASON_CHARS)
            raise RowError(
                place,
                f"the chat template rejects it: {why}",
                f"the chat template rejects it: {why}{self._remedy(messages)}",
            ) from error
        if ESCAPED_SENTINEL.search(str(text)):
            raise RowError(
                place,
                "the text of a special token in what the template writes as ASCII",
                "holds the text of a special token in a tool or a call, which the chat template writes with escapes"
                " (tojson with ensure_ascii), so that it cannot be kept as text; remove it from the row",
            )
        return str(text)

    def prompt(self, messages: tuple[Message, ...], place: str, tools: str = "") -> str:
        """Return the text of a conversation up to where the assistant's next answer begins."""
        return self.render(messages, place, tools, generation_prompt=True)

    def turns(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        """Return turns with the keys that the template takes."""
        return [self._turn(message) for message in messages]

    def _turn(self, message: Message) -> dict[str, Any]:
        """Return a turn as the template takes it."""
        content: Any = message.content
        if message.reasoning and self._thinks_in_content:
            content = f"<think>\n{message.reasoning}\n</think>\n\n{content}"
        if self.content_as_parts:
            content = [{"type": "text", "text": content}]
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.is_plain:
            return turn
        if message.reasoning and not self._thinks_in_content:
            turn |= dict.fromkeys(self._reasoning_keys, message.reasoning)
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call) for call in message.tool_calls]
        for key in ("tool_call_id", "name"):
            if getattr(message, key) is not None:
                turn[key] = getattr(message, key)
        return turn

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = call.arguments if self.calls_as_text else json.loads(call.arguments)
        function = {"name": call.name, "arguments": arguments}
        written: dict[str, Any] = {"type": "function", "function": function}
        return written if call.id is None else {"id": call.id, **written}

    def _remedy(self, messages: tuple[Message, ...]) -> str:
        """Return a remedy for a rejected conversation, if leaving its system message out is one."""
        if not messages or messages[0].role not in OPENING_ROLES:
            return ""
        try:
            self.render(messages[1:], "")
        except DataError:
            return ""
        return SYSTEM_REMEDY


SYSTEM_REMEDY = ". data.system_as=user puts a system message into the first user turn"


def require_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Check that a conversation can be rendered at all.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{place}: a conversation, but the model has no chat template. Set"
            f" data.chat_template to {', '.join(TEMPLATE_NAMES)} or a .jinja file"
        )
