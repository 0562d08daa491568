"""Ollama's Modelfile: the same prompt as Jinja's, or none."""

from __future__ import annotations

import json
import re

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message
from halfbyte.data.render import Renderer
from halfbyte.ship.modelfile import Turns, modelfile, read_turns

SYSTEM = Message("system", "Be brief.")
TALK = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
CONVERSATIONS = [TALK[:1], TALK, (SYSTEM, *TALK[:1]), (SYSTEM, *TALK)]


def go(template: str, messages: tuple[Message, ...]) -> str:
    """What Go's text/template makes of the actions that we write, and of no others."""
    tokens = re.findall(r'\{\{-? *((?:"(?:[^"\\]|\\.)*"|[^}"])*?) *-?\}\}', template)
    out = ""
    for number, message in enumerate(messages):
        taken: list[bool] = [True]  # whether each open branch is being written
        done: list[bool] = [True]  # whether one of its branches has been
        for token in tokens:
            first = number == 0
            second = number == 1 and messages[0].role == "system"
            tests = {
                'eq $m.Role "system"': message.role == "system",
                'eq $m.Role "user"': message.role == "user",
                "eq $i 0": first,
                'and (eq $i 1) (eq (index $.Messages 0).Role "system")': second,
            }
            if token.startswith("range"):
                continue
            if token.startswith("if "):
                holds = tests[token.removeprefix("if ")]
                taken.append(taken[-1] and holds)
                done.append(holds)
            elif token.startswith("else if "):
                holds = tests[token.removeprefix("else if ")] and not done[-1]
                taken[-1], done[-1] = taken[-2] and holds, done[-1] or holds
            elif token == "else":
                taken[-1] = taken[-2] and not done[-1]
            elif token == "end":
                if len(taken) > 1:
                    taken.pop(), done.pop()
            elif taken[-1]:
                out += message.content if token == "$m.Content" else json.loads(token)
    return out


@pytest.mark.parametrize("name", ["chatml", "gemma", "hermes", "plain"])
def test_go_says_what_jinja_says(
    name: str, chatml: PreTrainedTokenizerFast, gemma: PreTrainedTokenizerFast
) -> None:
    tokenizer = gemma if name == "gemma" else chatml
    renderer = Renderer(tokenizer, load_template(name))
    bos = tokenizer.bos_token
    turns = read_turns(renderer.prompt_text, bos)
    assert turns is not None
    for messages in CONVERSATIONS:
        wanted = renderer.prompt_text(messages).removeprefix(bos or "")
        assert turns.join(messages) == wanted
        assert go(turns.as_go(), messages) == wanted


def test_modelfile_names_file_template_and_stops(chatml: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(chatml, load_template("chatml"))
    text = modelfile(
        "a.gguf", renderer.prompt_text, chatml.bos_token, ["<|im_end|>"], CONVERSATIONS
    )
    assert text is not None
    assert text.startswith('FROM ./a.gguf\nTEMPLATE """{{- range $i, $m := .Messages }}')
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_template_that_go_cannot_say_gets_no_modelfile() -> None:
    def counts(messages: tuple[Message, ...]) -> str:
        return f"[{len(messages)}]" + "".join(f"<{m.role}>{m.content}" for m in messages) + "<a>"

    assert modelfile("a.gguf", counts, None, [], CONVERSATIONS) is None

    def shouts(messages: tuple[Message, ...]) -> str:
        return "".join(f"<{m.role}>{m.content.upper()}" for m in messages) + "<a>"

    assert modelfile("a.gguf", shouts, None, [], CONVERSATIONS) is None


def test_turns_join_as_a_server_would() -> None:
    turns = Turns("<s>", "</s>", "<u>", "<a>", "<u2>")
    assert turns.join((SYSTEM, *TALK)) == "<s>Be brief.</s>one<a>two<u2>three<a>"
    assert turns.join(TALK[:1]) == "<u>one<a>"
