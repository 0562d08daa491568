"""Chat templates as models have them: each answer is learnt in the context that generation would see.

The templates are written for these tests, in a few lines, from what is documented of each family.
"""

from __future__ import annotations

import json
import os
from datetime import date
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from toys import chatml_tokenizer
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat_template import with_date
from halfbyte.data.conversation import Message, Row, ToolCall, tools_of
from halfbyte.data.encoded import IGNORED, Encoded
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError
from halfbyte.generate.grammar import Grammars

GOLDEN = Path(__file__).parent / "golden/template_kinds.json"
DAY = date(2026, 3, 9)
CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
# Thoughts stay in the turns after the last question; there, an answer without thoughts has an empty block.
QWEN3 = (
    "{%- if tools %}{{ '<|im_start|>system\n<tools>' + tools | tojson + '</tools><|im_end|>\n' }}{% endif %}"
    "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{% if m.role == 'assistant' %}"
    "{%- set said = m.content %}{% set why = m.reasoning_content or '' %}"
    "{%- if '</think>' in said %}{% set why = said.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or why) %}"
    "{{- '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content }}"
    "{{- '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The date in a system turn of its own, thoughts kept everywhere, and the tags that mark generated text.
SMOLLM3 = (
    "{{- '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{%- endif %}{{ '<|im_end|>\n' }}"
    "{%- for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- generation %}{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}"
    "{%- endif %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt opens thoughts, and the template drops those of every answer, the last one too.
DEEPSEEK_R1 = (
    "{{- bos_token }}{% for m in messages %}"
    "{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{%- else %}{{ m.content }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Nothing ends a turn but the mark of the next one.
GLM = (
    "{{- '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\n' + tools | tojson }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{%- else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}{{ call.function.name + '\n' + call.function.arguments | tojson }}"
    "{%- endfor %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Headers of two tokens, and another stop token after a tool call.
LLAMA3 = (
    "{{- bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- tools | tojson + '<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{%- set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<|python_tag|>' + call.function.name + call.function.arguments | tojson + '<|eom_id|>' }}{% endfor %}"
    "{%- if not m.tool_calls %}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No system role; arguments of calls are JSON text; the EOS token ends answers.
MISTRAL = (
    "{{- bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS]' }}{% for call in m.tool_calls %}"
    "{{- call.function.name + call.function.arguments }}{% endfor %}{{ eos_token }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}"
)
HERMES = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HERMES_TOOLS = "{%- if tools %}{{ '<tools>' + tools | tojson + '</tools>' }}{% endif %}" + HERMES
GEMMA = (
    "{{- bos_token }}{% for m in messages %}"
    "{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{- '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Template, special tokens, other added tokens, BOS and EOS, and further settings of the renderer.
KINDS: dict[str, tuple[Any, list[str], list[str], str | None, str, dict[str, Any]]] = {
    "qwen3": (
        QWEN3,
        [],
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
            "</tool_response>",
        ],
        None,
        "<|im_end|>",
        {},
    ),
    "smollm3": (SMOLLM3, [], ["<think>", "</think>"], None, "<|im_end|>", {"day": DAY}),
    "deepseek_r1": (
        DEEPSEEK_R1,
        ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
        ["<think>", "</think>"],
        "<|begin|>",
        "<|end|>",
        {},
    ),
    "glm": (
        GLM,
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        [],
        None,
        "<|endoftext|>",
        {},
    ),
    "llama3": (
        LLAMA3,
        [
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|python_tag|>",
        ],
        [],
        "<|begin_of_text|>",
        "<|eot_id|>",
        {},
    ),
    "mistral": (
        MISTRAL,
        [
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
        ],
        [],
        "<s>",
        "</s>",
        {"system_as": "user"},
    ),
    "hermes": (
        {"default": HERMES_TOOLS, "tool_use": HERMES_TOOLS},
        [],
        ["<tool_call>", "</tool_call>", "<tools>", "</tools>"],
        None,
        "<|im_end|>",
        {},
    ),
    "gemma": (
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        [],
        "<bos>",
        "<eos>",
        {"system_as": "user"},
    ),
}
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "tide",
                "description": "Height of the tide.",
                "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
            },
        }
    ]
)
CALL = ToolCall("tide", '{"port": "Brest"}', "call00001")


def u(content: str) -> Message:
    return Message("user", content)


def a(content: str, **fields: Any) -> Message:
    return Message("assistant", content, **fields)


CASES = {
    "one": Row("one", (u("Name a port."), a("Brest"))),
    "two": Row("two", (u("Name a port."), a("Brest"), u("Another."), a("Vigo"))),
    "system": Row("system", (Message("system", "Be brief."), u("Name a port."), a("Brest"))),
    "thoughts": Row("thoughts", (u("2 + 2?"), a("4", reasoning="Two and two."))),
    "thoughts_in_content": Row(
        "thoughts_in_content", (u("2 + 2?"), a("<think>\nTwo and two.\n</think>\n\n4"))
    ),
    "thoughts_twice": Row(
        "thoughts_twice",
        (u("2 + 2?"), a("4", reasoning="Two and two."), u("3 + 3?"), a("6", reasoning="Three.")),
    ),
    "tools": Row(
        "tools",
        (
            u("Tide in Brest?"),
            a("", tool_calls=(CALL,)),
            Message("tool", '{"metres": 5}', tool_call_id="call00001", name="tide"),
            a("5 m."),
        ),
        tools=TOOLS,
    ),
    "weights": Row("weights", (u("Name a port."), a("Lyon", learnt=False), u("No."), a("Brest"))),
}
# What a template cannot write, and so refuses.
REFUSED = {
    "smollm3": ["tools"],
    "deepseek_r1": ["tools"],
    "glm": ["thoughts", "thoughts_twice"],
    "llama3": ["thoughts", "thoughts_twice"],
    "mistral": ["thoughts", "thoughts_twice"],
    "hermes": ["thoughts", "thoughts_twice"],
    "gemma": ["thoughts", "thoughts_twice", "tools"],
}


@cache
def renderer_of_kind(kind: str) -> Renderer:
    template, special, added, bos, eos, settings = KINDS[kind]
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(added)
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = template
    return Renderer(tokenizer, **settings)


def samples(kind: str, row: Row) -> list[Encoded]:
    (result,) = renderer_of_kind(kind).try_rows([row])
    if isinstance(result, DataError):
        raise result
    return result


def shown(kind: str, encoded: Encoded) -> str:
    """The text, with what is learnt between ‹ and ›."""
    tokenizer = renderer_of_kind(kind).tokenizer
    pairs = zip(encoded.ids, encoded.labels, strict=True)
    parts = []
    for learnt, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = str(tokenizer.decode([index for index, _ in group]))
        parts.append(f"‹{text}›" if learnt else text)
    return "".join(parts)


USABLE = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in KINDS
    for name in CASES
    if name not in REFUSED.get(kind, ())
]


def _pretty(golden: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The golden file: a line for each sample."""
    kinds = []
    for kind, made in golden.items():
        cases = []
        for name, each in made.items():
            lines = ",\n".join(json.dumps(sample, ensure_ascii=False) for sample in each)
            cases.append(f'"{name}": [\n{lines}\n]')
        kinds.append(f'"{kind}": {{\n' + ",\n".join(cases) + "\n}")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_labels_of_each_kind_are_the_golden_ones(kind: str) -> None:
    """HALFBYTE_WRITE_GOLDEN=1 writes the file again, for review; ``shown`` is for the reader."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    results = {
        name: [
            {"shown": shown(kind, sample), "ids": sample.ids, "labels": sample.labels}
            for sample in samples(kind, row)
        ]
        for name, row in CASES.items()
        if name not in REFUSED.get(kind, ())
    }
    if os.environ.get("HALFBYTE_WRITE_GOLDEN"):
        golden[kind] = results
        GOLDEN.write_text(_pretty(golden), encoding="utf-8")
    assert golden[kind] == results


@pytest.mark.parametrize(("kind", "name"), USABLE)
def test_ids_before_an_answer_are_those_of_its_generation_prompt(kind: str, name: str) -> None:
    row, renderer = CASES[name], renderer_of_kind(kind)
    prompts = [
        renderer.encode_prompt(row.messages[:number], row.place, row.tools)
        for number, message in enumerate(row.messages)
        if message.role == "assistant" and message.learnt
    ]
    starts = []
    for sample in samples(kind, row):
        learnt = [label != IGNORED for label in sample.labels]
        begins = [n for n, now in enumerate(learnt) if now and (n == 0 or not learnt[n - 1])]
        starts += [sample.ids[:begin] for begin in begins]
    assert sorted(starts) == sorted(prompts)


@pytest.mark.parametrize(("kind", "name"), USABLE)
def test_whole_text_is_that_of_transformers(kind: str, name: str) -> None:
    row, renderer = CASES[name], renderer_of_kind(kind)
    if kind == "deepseek_r1":
        pytest.skip("its template drops the thoughts that its prompt opens")
    template = renderer._template
    turns = [template._turn(message) for message in renderer._placed(row.messages)]
    tools = tools_of(row.tools) if row.tools else None
    text = str(renderer.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False))
    ours = str(renderer.tokenizer.decode(samples(kind, row)[0].ids))
    assert text.startswith(ours) or (kind == "glm" and ours == text + "<|user|>")


@pytest.mark.parametrize(("kind", "name"), USABLE)
def test_learnt_text_is_the_answers_and_their_stops(kind: str, name: str) -> None:
    row, renderer = CASES[name], renderer_of_kind(kind)
    learnt = [
        part.split("›")[0] for s in samples(kind, row) for part in shown(kind, s).split("‹")[1:]
    ]
    answers = [m for m in row.messages if m.role == "assistant" and m.learnt]
    assert len(learnt) == len(answers)
    stops = tuple(str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in renderer.stop_ids)
    assert all(text.endswith(stops) for text in learnt)
    for answer in answers:
        visible = answer.content.split("</think>")[-1].strip()
        assert any(visible in text for text in learnt)
        if answer.reasoning:
            assert any(answer.reasoning in text and "</think>" in text for text in learnt)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in REFUSED.items() for name in names]
)
def test_what_a_template_drops_is_named(kind: str, name: str) -> None:
    with pytest.raises(DataError, match=r"the chat template (drops|rejects)"):
        samples(kind, CASES[name])


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
def test_a_template_without_a_system_role_names_the_remedy(kind: str) -> None:
    template, special, _, bos, eos, _ = KINDS[kind]
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    with pytest.raises(DataError, match=r"data\.system_as=user puts a system message into"):
        Renderer(tokenizer, template).encode_row(CASES["system"])


def test_a_template_that_silently_drops_the_system_message_is_an_error() -> None:
    template = "{%- for m in messages if m.role != 'system' %}" + CHATML_TURN + "{% endfor %}"
    template += "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    with pytest.raises(DataError, match=r"drops the system message.*data.system_as=user"):
        Renderer(chatml_tokenizer(), template).encode_row(CASES["system"])


def test_thoughts_of_a_user_stay_text_and_those_of_an_assistant_are_tokens() -> None:
    renderer = renderer_of_kind("qwen3")
    think = renderer.tokenizer.convert_tokens_to_ids("<think>")
    row = Row("r", (u("What is <think>?"), a("<think>\nA mark.\n</think>\n\nA mark.")))
    (sample,) = samples("qwen3", row)
    assert sample.ids.count(think) == 1
    assert "What is <think>?" in str(renderer.tokenizer.decode(sample.ids))
    assert sample.labels.count(think) == 1
    row = Row("r", (u("Which mark?"), a("It ends with <|im_end|> there.")))
    (sample,) = samples("qwen3", row)
    assert sample.labels.count(renderer.stop_ids[0]) == 1


@pytest.mark.parametrize("stop", ["template", "eos"])
def test_a_template_without_a_stop_is_mended_by_a_named_remedy(stop: str) -> None:
    template = (
        "{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    if stop == "template":
        with pytest.raises(DataError, match=r"Set data\.stop=eos to end answers"):
            Renderer(chatml_tokenizer(), template)
        return
    renderer = Renderer(chatml_tokenizer(), template, stop="eos")
    (both,) = renderer.try_rows([CASES["two"]])
    assert not isinstance(both, DataError)
    texts = [str(renderer.tokenizer.decode(sample.ids)) for sample in both]
    assert texts == [
        "user: Name a port.\nassistant: Brest\nuser: Another.\nassistant: Vigo<|im_end|>",
        "user: Name a port.\nassistant: Brest<|im_end|>",
    ]


def test_stop_eos_has_no_effect_where_the_template_ends_answers() -> None:
    with pytest.raises(DataError, match=r"data\.stop: eos has no effect"):
        Renderer(chatml_tokenizer(), stop="eos")


def test_day_is_the_one_given_and_stays_in_the_template() -> None:
    renderer = renderer_of_kind("smollm3")
    assert "Today: 09 March 2026" in shown("smollm3", samples("smollm3", CASES["one"])[0])
    assert "strftime_now" not in renderer.tokenizer.chat_template
    computed = SMOLLM3.replace("'%d %B %Y'", "'%d %B' ~ ' %Y'")
    again = Renderer(chatml_tokenizer(), computed, day=DAY)
    assert "09 March 2026" in again.prompt_text((u("x"),))


def published() -> list[str]:
    """Names of the chat templates of many models, as TRL keeps them."""
    folder = resources.files("trl").joinpath("chat_templates")
    names = [file.name for file in folder.iterdir() if file.name.endswith(".jinja")]
    return sorted(name for name in names if not name.endswith("_training.jinja"))


@pytest.mark.parametrize("name", published())
def test_published_templates_train_as_they_generate(name: str) -> None:
    import re

    template = resources.files("trl").joinpath("chat_templates").joinpath(name).read_text("utf-8")
    tokenizer = chatml_tokenizer()
    marks = re.findall(r"<\|?[A-Za-z_/｜▁|][^<>\s'\"{}]*>|\[/?[A-Z_]+\]", template)
    tokenizer.add_tokens(sorted({mark for mark in marks if 2 < len(mark) < 40}))
    tokenizer.bos_token = "<|endoftext|>"
    renderer = Renderer(tokenizer, template)
    for row in CASES.values():
        (result,) = renderer.try_rows([row])
        if isinstance(result, DataError):
            assert re.search("drops|rejects|differently", str(result))
            continue
        prompt = renderer.encode_prompt(row.messages[:-1], row.place, row.tools)
        sample = result[0]
        assert sample.ids[: len(prompt)] == prompt
        assert sample.labels[len(prompt) :] == sample.ids[len(prompt) :]


def test_a_dated_template_is_dated_once() -> None:
    for clock in ("'%d %B %Y'", "'%d %B' ~ ' %Y'"):
        dated = with_date(SMOLLM3.replace("'%d %B %Y'", clock), DAY)
        assert with_date(dated, date(2031, 1, 1)) == dated


def test_a_special_token_that_the_template_does_not_know_stays_text() -> None:
    """SmolLM2's <filename> would vanish from every answer, since decoding leaves special tokens out."""
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filename>"]})
    renderer = Renderer(tokenizer)
    encoded = renderer.encode_row(Row("r", (u("How?"), a("Run git add <filename> now"))))
    assert encoded.escaped
    assert (
        renderer.decode([i for i in encoded.labels if i != IGNORED]) == "Run git add <filename> now"
    )


@pytest.mark.parametrize("name", ["thoughts_twice", "two", "thoughts_in_content"])
def test_loss_on_last_learns_the_last_answer_of_any_template(name: str) -> None:
    template, _, added, _, _, _ = KINDS["qwen3"]
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(added)
    (samples,) = Renderer(tokenizer, template, "last").try_rows([CASES[name]])
    assert isinstance(samples, list)
    assert len(samples) == 1
    text = str(tokenizer.decode([i for i in samples[0].labels if i != IGNORED]))
    assert text.endswith(
        f"{CASES[name].messages[-1].content.split('</think>')[-1].strip()}<|im_end|>"
    )


def test_arguments_that_a_template_prints_raw_are_json() -> None:
    template = HERMES.replace(
        "call.function | tojson", "call.function.name ~ call.function.arguments"
    )
    row = Row("r", (u("x"), a("", tool_calls=(ToolCall("f", '{"a": true, "b": null}'),))))
    encoded = Renderer(chatml_tokenizer(), template).encode_row(row)
    assert '<tool_call>f{"a": true, "b": null}</tool_call>' in chatml_tokenizer().decode(
        encoded.ids
    )


def test_a_call_that_a_template_drops_beside_another_is_an_error() -> None:
    template = HERMES.replace(
        "for call in m.tool_calls or []", "for call in (m.tool_calls or [])[:1]"
    )
    calls = (ToolCall("f", '{"a": 1}'), ToolCall("g", '{"b": 2}'))
    with pytest.raises(DataError, match="drops the tool calls"):
        Renderer(chatml_tokenizer(), template).encode_row(
            Row("r", (u("x"), a("", tool_calls=calls)))
        )


def test_ids_of_calls_never_become_marks() -> None:
    template = HERMES.replace("call.function | tojson", "call.id ~ call.function.name")
    renderer = Renderer(chatml_tokenizer(), template)
    row = Row("r", (u("x"), a("", tool_calls=(ToolCall("f", "{}", "<|im_end|>"),))))
    assert renderer.encode_row(row).labels.count(renderer.stop_ids[0]) == 1


def learnt(renderer: Renderer, *messages: Message, tools: str = "") -> list[str]:
    """What is learnt of a conversation, the last answer first."""
    (samples,) = renderer.try_rows([Row("r", messages, tools=tools)])
    if isinstance(samples, DataError):
        raise samples
    return [
        str(renderer.tokenizer.decode([i for i in sample.labels if i != IGNORED]))
        for sample in samples
    ]


def renderer_with(template: str, *added: str, special: tuple[str, ...] = ()) -> Renderer:
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(added))
    return Renderer(tokenizer, template)


ASKED = (
    "{%- for m in messages %}{% if m.role != 'assistant' %}{{ '<|user|>' + m.content }}{% else %}"
)
PROMPTED = "{% endif %}{% endfor %}{% if add_generation_prompt %}"


def test_the_end_of_thoughts_that_a_prompt_opens_is_learnt_once() -> None:
    """GLM-4.7's prompt opens thoughts, and of an answer without any it writes their end alone."""
    template = (
        f"{ASKED}{{{{ '<|assistant|>' }}}}{{% if m.reasoning_content %}}"
        "{{ '<think>' + m.reasoning_content }}{% endif %}{{ '</think>' + m.content + '<|im_end|>' }}"
        f"{PROMPTED}{{{{ '<|assistant|><think>' }}}}{{% endif %}}"
    )
    renderer = renderer_with(template, "<think>", "</think>", "<|user|>", "<|assistant|>")
    assert learnt(renderer, u("2 + 2?"), a("4")) == ["</think>4<|im_end|>"]
    thought = learnt(renderer, u("2 + 2?"), a("4", reasoning="Two."))
    assert thought == ["Two.</think>4<|im_end|>"]
    with pytest.raises(DataError, match="differently from the prompt"):
        learnt(renderer, u("2 + 2?"), a("<think>Two.</think>4"))


@pytest.mark.parametrize("closed", ["<think>\n</think>", "<|channel>thought\n<channel|>"])
def test_an_empty_block_of_thoughts_in_the_prompt_alone_is_context(closed: str) -> None:
    """As Gemma 4 and modes without thoughts have it."""
    opener = closed.split("\n")[0]
    template = (
        f"{ASKED}{{{{ '<|assistant|>' }}}}{{% if m.reasoning_content %}}{{{{ {opener!r} + m.reasoning_content }}}}"
        "{% endif %}{{ m.content + '<|im_end|>' }}"
        f"{PROMPTED}{{{{ '<|assistant|>' + {closed!r} }}}}{{% endif %}}"
    )
    marks = ("<think>", "</think>", "<|channel>", "<channel|>", "<|user|>", "<|assistant|>")
    renderer = renderer_with(template, *marks)
    prompt = renderer.encode_prompt((u("2 + 2?"),))
    (encoded,) = renderer.encode_rows([Row("r", (u("2 + 2?"), a("4")))])
    assert encoded.ids[: len(prompt)] == prompt
    assert str(renderer.tokenizer.decode(encoded.ids[len(prompt) :])) == "4<|im_end|>"
    with pytest.raises(DataError, match="differently from the prompt"):
        learnt(renderer, u("2 + 2?"), a("4", reasoning="Two."))


def test_an_answer_that_its_template_ends_twice_is_refused() -> None:
    """Generation would stop behind the thoughts."""
    template = (
        f"{ASKED}{{{{ '<|begin|>' }}}}{{% if m.reasoning_content %}}"
        "{{ '<|think|>' + m.reasoning_content + '<|end|><|begin|>' }}{% endif %}"
        "{{ '<|content|>' + m.content + '<|end|>' }}"
        f"{PROMPTED}{{{{ '<|begin|>' }}}}{{% endif %}}"
    )
    renderer = renderer_with(
        template, "<|begin|>", "<|end|>", "<|think|>", "<|content|>", "<|user|>"
    )
    assert learnt(renderer, u("2 + 2?"), a("4")) == ["<|content|>4<|end|>"]
    with pytest.raises(DataError, match="generation would stop there"):
        learnt(renderer, u("2 + 2?"), a("4", reasoning="Two."))


def test_a_mark_around_an_answer_is_not_its_end() -> None:
    template = (
        f"{ASKED}{{{{ '<|assistant|><answer>' + m.content + '</answer><|im_end|>\n' }}}}"
        f"{PROMPTED}{{{{ '<|assistant|>' }}}}{{% endif %}}"
    )
    renderer = renderer_with(template, "<answer>", "</answer>", "<|user|>", "<|assistant|>")
    assert learnt(renderer, u("2 + 2?"), a("4")) == ["<answer>4</answer><|im_end|>"]
    assert renderer.stop_id == renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_calls_and_thoughts_written_into_content_are_tokens_in_every_template() -> None:
    """A default system message may speak of thoughts, and only a last answer have an empty block of them."""
    speaks = "{{ '<|im_start|>system\nThink in <think> and </think>.<|im_end|>\n' }}" + HERMES
    written = "<think>\nIt is far.\n</think>\n\n<tool_call>\n{}\n</tool_call>"
    for template in (QWEN3, speaks):
        marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        renderer = renderer_with(template, *marks)
        (samples,) = renderer.try_rows([Row("r", (u("Tide?"), a(written)))])
        assert isinstance(samples, list)
        for mark in marks:
            index = renderer.tokenizer.convert_tokens_to_ids(mark)
            assert samples[0].labels.count(index) == 1, mark


def test_control_tokens_that_no_template_names_stay_text() -> None:
    renderer = renderer_with(HERMES, "<|fim_prefix|>", "<tide>")
    row = Row("r", (u("Explain <|fim_prefix|> and <tide>."), a("Well, <|fim_prefix|> is text.")))
    (encoded,) = renderer.encode_rows([row])
    ids = renderer.tokenizer.convert_tokens_to_ids(["<|fim_prefix|>", "<tide>"])
    assert [encoded.ids.count(index) for index in ids] == [0, 1]


def llama_2_tokenizer(scheme: str) -> Any:
    """A tokenizer that marks the beginning of a text, with ``always`` also behind special tokens."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["Name a port. Brest Vigo user assistant"] * 9
    core.train_from_iterator(words, BpeTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_an_answer_behind_text_does_not_begin_a_text(scheme: str) -> None:
    tokenizer = llama_2_tokenizer(scheme)
    template = (
        "{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    renderer = Renderer(tokenizer, template)
    row = Row("r", (u("Name </s> a port."), a("Brest"), u("Another."), a("Vigo")))
    (encoded,) = renderer.encode_rows([row])
    text = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in row.messages], tokenize=False
    )
    assert tokenizer.decode(encoded.ids).replace(" ", "") == text.strip().replace(" ", "")
    words = [t for i, t in zip(encoded.labels, encoded.ids, strict=True) if i != IGNORED]
    assert tokenizer.convert_ids_to_tokens(words) == [
        *tokenizer.tokenize("\nBrest")[-2:],
        "</s>",
        *tokenizer.tokenize("\nVigo")[-2:],
        "</s>",
    ] or "▁" not in "".join(tokenizer.convert_ids_to_tokens(words))
    prompt = renderer.encode_prompt(row.messages[:3])
    assert encoded.ids[: len(prompt)] == prompt


LLAMA_2 = (
    "{%- for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_grammar_lets_answers_be_as_the_template_writes_them(scheme: str) -> None:
    # dottxt-ai/outlines#1456
    tokenizer = llama_2_tokenizer(scheme)
    for template in (LLAMA_2, LLAMA_2.replace("' ' + m.content + ' ' +", "m.content +")):
        renderer = Renderer(tokenizer, template)
        (encoded,) = renderer.encode_rows([Row("r", (u("Name a port."), a("Brest Vigo")))])
        ids = [i for i, t in zip(encoded.ids, encoded.labels, strict=True) if t != IGNORED]
        grammars = Grammars(renderer, len(tokenizer), may_think=False)
        assert grammars.of_texts(["Brest Vigo", "Name"]).validate_tokens(ids) == len(ids)
        assert grammars.of_texts(["Brest", "Name"]).validate_tokens(ids) < len(ids)


def test_what_stands_elsewhere_too_is_dropped_all_the_same() -> None:
    no_thoughts = HERMES
    with pytest.raises(DataError, match="drops the thoughts"):
        learnt(renderer_with(no_thoughts), u("2 + 2?"), a("Add them. 4", reasoning="Add them."))
    no_system = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    system = Message("system", "Translate")
    with pytest.raises(DataError, match="drops the system message"):
        learnt(renderer_with(no_system + HERMES), system, u("Translate this"), a("Voilà"))
    bare = HERMES.replace("m.content", "('' if m.tool_calls else m.content)")
    call = a("tide", tool_calls=(CALL,))
    with pytest.raises(DataError, match="drops the assistant message"):
        learnt(renderer_with(bare), u("Tide?"), call)


def test_bos_that_also_ends_answers_may_stand_often() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    template = (
        "{{ bos_token }}{%- for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    renderer = Renderer(tokenizer, template)
    assert learnt(renderer, u("Hi"), a("Ho")) == ["Ho<|endoftext|>"]
