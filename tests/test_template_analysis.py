"""Templates that only copy contents: which ones do, and that filled-in texts equal rendered ones."""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import chatml_tokenizer

from halfbyte.data.answers import Sample, Span
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message
from halfbyte.data.template_analysis import only_copies
from halfbyte.data.template_cache import TemplateCache
from halfbyte.errors import DataError

FOR = "{% for message in messages %}"
END = "{% endfor %}"
COPIES = {
    "attribute": f"{FOR}{{{{ message.role + ': ' + message.content }}}}{END}",
    "item_trimmed": f"{FOR}{{{{ message['content'] | trim ~ '.' }}}}{END}",
    "stripped": f"{FOR}{{{{ message.content.strip() }}}}|{END}",
    "named": f"{FOR}{{% set c = message.content %}}<{{{{ c|trim }}}}>{END}",
    "joined": f"{FOR}{{% set c = '<' + message.content %}}{{{{ bos_token + c }}}}{END}",
    "twice": f"{FOR}{{{{ message.content }}}}/{{{{ message.content | trim }}}}{END}",
    "slices": "{% set rest = messages[1:] %}{{ messages[0].content }}{% for m in rest %}"
    "{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}",
    "type": f"{FOR}{{% if message.content is string %}}{{{{ message.content }}}}"
    "{% else %}{{ message.content[0].text }}{% endif %}{% endfor %}",
    "missing_key": f"{FOR}{{% if message.tool_calls is not defined %}}{{{{ message.content }}}}{{% endif %}}{END}",
    "namespace": "{% set ns = namespace(n=0) %}"
    f"{FOR}{{% set ns.n = ns.n + 1 %}}{{{{ ns.n }}}}{{{{ message.content }}}}{END}",
    "loop_controls": f"{FOR}{{% if loop.index > 2 %}}{{% break %}}{{% endif %}}{{{{ message.content }}}}{END}",
}
LOOKS = {
    "test": f"{FOR}{{% if 'x' in message.content %}}x{{% endif %}}{END}",
    "truth": f"{FOR}{{% if message.content %}}x{{% endif %}}{END}",
    "truth_of_a_name": f"{FOR}{{% set c = message.content %}}{{{{ 'a' if c else 'b' }}}}{END}",
    "length": f"{FOR}{{{{ message.content | length }}}}{END}",
    "upper": f"{FOR}{{{{ message.content | upper }}}}{END}",
    "method": f"{FOR}{{{{ message.content.split('x')[0] }}}}{END}",
    "item": f"{FOR}{{{{ message.content[0] }}}}{END}",
    "trim_of_joined": f"{FOR}{{{{ ('a ' + message.content) | trim }}}}{END}",
    "trim_of_a_name": f"{FOR}{{% set c = 'a ' + message.content %}}{{{{ c | trim }}}}{END}",
    "trim_of_chars": f"{FOR}{{{{ message.content | trim('x') }}}}{END}",
    "whole_message": f"{FOR}{{{{ message }}}}{END}",
    "json": "{{ messages | tojson }}",
    "items": f"{FOR}{{{{ message.items() }}}}{END}",
    "values": f"{FOR}{{% for v in message.values() %}}{{{{ v }}}}{{% endfor %}}{END}",
    "any_key": f"{FOR}{{% for k in message %}}{{{{ message[k] }}}}{{% endfor %}}{END}",
    "or": f"{FOR}{{{{ message.content or 'none' }}}}{END}",
    "equal": f"{FOR}{{{{ message.content == 'x' }}}}{END}",
    "namespace": f"{{% set ns = namespace(c='') %}}{FOR}{{% set ns.c = message.content %}}{END}{{{{ ns.c|length }}}}",
    "list": f"{FOR}{{{{ [message.content] | join }}}}{END}",
    "macro": "{% macro f(c) %}{{ c|upper }}{% endmacro %}"
    + f"{FOR}{{{{ f(message.content) }}}}{END}",
    "block": f"{FOR}{{% set c %}}{{{{ message.content }}}}{{% endset %}}{{{{ c|length }}}}{END}",
    "filter_block": f"{{% filter upper %}}{FOR}{{{{ message.content }}}}{END}{{% endfilter %}}",
    "neighbour": f"{FOR}{{{{ loop.previtem.content if not loop.first }}}}{END}",
    "changed": f"{FOR}{{{{ loop.changed(message.content) }}}}{END}",
    "later": "{% set c = '' %}"
    + f"{FOR}{{% if c == 'x' %}}!{{% endif %}}{{% set c = message.content %}}{END}",
    "clock": "{{ strftime_now('%d') }}" + f"{FOR}{{{{ message.content }}}}{END}",
    "hidden_clock": "{% set ns = namespace(f=strftime_now) %}{{ ns.f('%d') }}",
    "chance": "{{ ['a', 'b'] | random }}" + f"{FOR}{{{{ message.content }}}}{END}",
    "generation": f"{FOR}{{% generation %}}{{{{ message.content }}}}{{% endgeneration %}}{END}",
    "sorted": "{% for m in messages | sort(attribute='content') %}{{ m.content }}{% endfor %}",
    "chosen": "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "renamed": f"{FOR}{{% set raise_exception = namespace %}}{{{{ raise_exception(c=message.content).c }}}}{END}",
    "repeated": f"{FOR}{{{{ message.content * 2 }}}}{END}",
    "formatted": f"{FOR}{{{{ '%s' % message.content }}}}{END}",
}
CONTENTS = st.text(st.sampled_from(" \n\t\u2003\u00a0xa<é東\U000f0003"), max_size=8)


def run(template: str, messages: tuple[Message, ...]) -> list[str]:
    """What transformers renders: the conversation, then the prompt of each answer."""
    tokenizer: Any = chatml_tokenizer()
    turns = [{"role": m.role, "content": m.content} for m in messages]
    prompts = [turns[:n] for n, m in enumerate(messages) if m.role == "assistant"]
    options = {"chat_template": template, "tokenize": False}
    try:
        return [
            tokenizer.apply_chat_template(turns, **options),
            *(
                tokenizer.apply_chat_template(p, add_generation_prompt=True, **options)
                for p in prompts
            ),
        ]
    except Exception as error:
        raise DataError(str(error)) from error


@pytest.mark.parametrize("name", COPIES)
def test_only_copies_sees_that_a_template_copies(name: str) -> None:
    assert only_copies(COPIES[name])


@pytest.mark.parametrize("name", LOOKS)
def test_only_copies_sees_that_a_template_may_do_more(name: str) -> None:
    assert not only_copies(LOOKS[name])
    assert TemplateCache(LOOKS[name], lambda _: []).sample((Message("user", "x"),)) is None


def published() -> dict[str, str]:
    """The chat templates of many models, as TRL keeps them for its tests and patches."""
    folder = resources.files("trl").joinpath("chat_templates")
    files = [file for file in folder.iterdir() if file.name.endswith(".jinja")]
    return {file.name: file.read_text("utf-8") for file in sorted(files, key=lambda f: f.name)}


def samples(template: str, messages: tuple[Message, ...]) -> list[Sample]:
    """The whole text, with a span of no length where each answer begins."""
    text, *prompts = run(template, messages)
    if not all(text.startswith(prompt) for prompt in prompts):
        raise DataError("an answer does not follow its generation prompt")
    return [Sample(text, [Span(len(prompt), len(prompt), learnt=True) for prompt in prompts])]


@settings(max_examples=8, deadline=None)
@given(st.lists(CONTENTS, min_size=5, max_size=5), st.booleans())
def test_texts_put_together_are_those_that_the_template_writes(
    contents: list[str], with_system: bool
) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")[0 if with_system else 1 :]
    messages = tuple(Message(r, c) for r, c in zip(roles, contents, strict=False))
    ours = {name: load_template(name) for name in ("gemma", "chatml", "hermes", "plain")}
    compared = 0
    for name, template in {**COPIES, **ours, **published()}.items():
        sample = TemplateCache(template, partial(samples, template)).sample(messages)
        if sample is not None:
            assert [sample] == samples(template, messages), name
            compared += 1
    assert compared >= len(COPIES) + 3


def test_published_templates_of_common_models_are_seen_to_copy() -> None:
    copying = {name for name, template in published().items() if only_copies(template)}
    assert copying >= {"gemma3.jinja", "llama3.jinja", "phi3.jinja"}
    assert not copying & {"qwen3.jinja", "deepseekv3.jinja", "llama3_2.jinja"}


@pytest.mark.parametrize("extra", ["\u2003", "\U000f0001"])
def test_template_that_writes_placeholders_itself_is_run_for_each_row(extra: str) -> None:
    template = COPIES["attribute"] + extra
    cache = TemplateCache(template, partial(samples, template))
    assert cache.sample((Message("user", "x"),)) is None


def test_template_runs_once_for_all_rows_with_the_same_roles() -> None:
    calls = []

    def render(messages: tuple[Message, ...]) -> list[Sample]:
        calls.append(messages)
        return samples(COPIES["attribute"], messages)

    cache = TemplateCache(COPIES["attribute"], render)
    for content in ("a", "b", "c"):
        sample = cache.sample((Message("user", content), Message("assistant", "x")))
        assert sample is not None
        assert sample.text == f"user: {content}assistant: x"
    assert len(calls) == 1
