"""Owns Ollama's Modelfile: the run's chat template in Go's template language, checked on conversations.

Ollama does not run Jinja: it looks a template up among those it knows, and otherwise silently gives the
model bare text. So the text around each turn is found by rendering marked messages with the Jinja
template, then written as a Go template, and the joined result is compared with what Jinja renders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from halfbyte.data.conversation import Message
from halfbyte.errors import DataError

SYSTEM, FIRST, ANSWER, SECOND = "⟦system⟧", "⟦first⟧", "⟦answer⟧", "⟦second⟧"
Render = Callable[[tuple[Message, ...]], str]


@dataclass(frozen=True)
class Turns:
    """The text that a template writes around the messages of a conversation.

    Attributes:
        before_system: text before the system message.
        after_system: text between the system message and the first user message.
        start: text before the first user message if there is no system message.
        to_answer: text between a user message and the answer.
        to_user: text between an answer and the next user message.
    """

    before_system: str
    after_system: str
    start: str
    to_answer: str
    to_user: str

    def join(self, messages: tuple[Message, ...]) -> str:
        """Return the prompt, up to the start of the next answer."""
        text = ""
        for number, message in enumerate(messages):
            if message.role == "system":
                text += self.before_system + message.content
            elif message.role == "user":
                lead = self.start if number == 0 else self.to_user
                if number == 1 and messages[0].role == "system":
                    lead = self.after_system
                text += lead + message.content + self.to_answer
            else:
                text += message.content
        return text

    def as_go(self) -> str:
        """Return the equivalent Go template over ``.Messages``."""
        start, after = _literal(self.start), _literal(self.after_system)
        return (
            "{{- range $i, $m := .Messages }}"
            f'{{{{- if eq $m.Role "system" }}}}{_literal(self.before_system)}{{{{ $m.Content }}}}'
            f'{{{{- else if eq $m.Role "user" }}}}{{{{- if eq $i 0 }}}}{start}'
            f'{{{{- else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}}}{after}'
            f"{{{{- else }}}}{_literal(self.to_user)}{{{{- end }}}}{{{{ $m.Content }}}}"
            f"{_literal(self.to_answer)}"
            "{{- else }}{{ $m.Content }}{{- end }}{{- end }}"
        )


def read_turns(render: Render, bos: str | None) -> Turns | None:
    """Return the affixes of a chat template, or None if its turns do not have this form.

    Args:
        render: renders a conversation to the text of its generation prompt.
        bos: the BOS token, which Ollama prepends by itself.
    """
    user, answer, again = (
        Message("user", FIRST),
        Message("assistant", ANSWER),
        Message("user", SECOND),
    )
    try:
        whole = render((Message("system", SYSTEM), user, answer, again))
        alone = render((user,))
    except DataError:
        return None
    whole, alone = (text.removeprefix(bos or "") for text in (whole, alone))
    marks = [SYSTEM, FIRST, ANSWER, SECOND]
    if any(whole.count(mark) != 1 for mark in marks) or alone.count(FIRST) != 1:
        return None
    pieces = []
    for mark in marks:
        before, _, whole = whole.partition(mark)
        pieces.append(before)
    start, _, to_answer = alone.partition(FIRST)
    if not pieces[2] == whole == to_answer:
        return None
    return Turns(pieces[0], pieces[1], start, to_answer, pieces[3])


def modelfile(
    gguf_name: str,
    render: Render,
    bos: str | None,
    stops: Iterable[str],
    conversations: list[tuple[Message, ...]],
) -> str | None:
    """Return the Modelfile for a GGUF file, or None if no Go template renders the same prompts."""
    turns = read_turns(render, bos)
    if turns is None:
        return None
    if any(turns.join(each) != render(each).removeprefix(bos or "") for each in conversations):
        return None
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{turns.as_go()}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _literal(text: str) -> str:
    """Return a Go action that writes the text unchanged, regardless of trimming around it."""
    if not text:
        return ""
    # Go accepts JSON's escapes; a Modelfile's """ must not occur.
    quoted = json.dumps(text, ensure_ascii=False)
    return "{{ " + quoted + " }}"
