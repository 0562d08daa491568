"""What clients send: bodies of common clients, tools and thoughts, each answer checked for what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from serving import Process, serving
from toys import PORT_TOOLS

pytestmark = pytest.mark.real
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
IGNORED = "x-halfbyte-ignored"
TIDE, ALL, PORT = "Tide in Brest?", "All of Brest now!", "Is Brest a port?"
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tool_run: Path) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("clients") / "log"
    options = ("--compute-dtype", "fp32", "--max-context", 1024, "--slots", 4)
    with serving(log, tool_run, *options) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def post(server: Process, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "tools", **body}, timeout=120)


def create(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**options)


def message(reply: dict[str, Any]) -> dict[str, Any]:
    return dict(reply["choices"][0]["message"])


def is_port(reply: dict[str, Any]) -> bool:
    answer = message(reply)
    return (answer["content"], answer["reasoning_content"]) == ("Brest is a port.", "It is Brest.")


def calls_tide(reply: dict[str, Any]) -> bool:
    (call,) = message(reply)["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    return (call["function"]["name"], arguments) == ("tide", {"port": "Brest"})


def ends_after(count: int) -> Callable[[dict[str, Any]], bool]:
    return lambda reply: reply["usage"]["completion_tokens"] == count


def is_sure(reply: dict[str, Any]) -> bool:
    return isinstance(json.loads(message(reply)["content"])["sure"], bool)


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def streams_port(reply: list[dict[str, Any]]) -> bool:
    deltas = [choice["delta"] for chunk in reply for choice in chunk["choices"]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    thoughts = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    return (thoughts, text) == ("It is Brest.", "Brest is a port.") and "usage" in reply[-1]


STRICT_TIDE = {**PORT_TOOLS[0], "function": {**PORT_TOOLS[0]["function"], "strict": True}}
HISTORY = [
    *said(TIDE),
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "reasoning_content": "The port is Brest.",
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": "tide", "arguments": '{"port": "Brest"}'},
                "index": 0,
            }
        ],
    },
    {
        "role": "tool",
        "tool_call_id": "call00001",
        "content": [{"type": "text", "text": '{"metres": 5}'}],
    },
]
# What the clients send by themselves, as their sources and public reports show it.
BODIES: dict[str, tuple[str, dict[str, Any], Callable[[Any], bool]]] = {
    "openai": (CHAT, {"messages": said(PORT)}, is_port),
    "openai, tools": (
        CHAT,
        {"messages": said(TIDE), "tools": [STRICT_TIDE], "parallel_tool_calls": False},
        calls_tide,
    ),
    "openai, a tool's output": (
        CHAT,
        {"messages": HISTORY, "tools": PORT_TOOLS},
        lambda reply: message(reply)["content"] == "5 m.",
    ),
    "openai, a named tool": (
        CHAT,
        {
            "messages": said(ALL),
            "tools": PORT_TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "wind"}},
            "parallel_tool_calls": False,
        },
        lambda reply: message(reply)["tool_calls"][0]["function"]["name"] == "wind",
    ),
    "openai, reasoning model": (
        CHAT,
        {
            "messages": [{"role": "developer", "content": ""}, *said(PORT)][1:],
            "max_completion_tokens": 60,
            "reasoning_effort": "low",
            "store": True,
            "metadata": {"trace": "7"},
            "verbosity": "low",
        },
        is_port,
    ),
    "openai, both limits": (
        CHAT,
        {"messages": said(PORT), "max_tokens": 500, "max_completion_tokens": 3},
        ends_after(3),
    ),
    "openai, logit_bias": (
        CHAT,
        {"messages": said(PORT), "logit_bias": {"2": 100}, "max_tokens": 9},
        ends_after(1),  # <|im_end|>
    ),
    "openai, parsed": (
        CHAT,
        {
            "messages": said(PORT),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "sure", "strict": True, "schema": SCHEMA},
            },
        },
        is_sure,
    ),
    "openai, logprobs": (
        CHAT,
        {"messages": said(PORT), "logprobs": True, "top_logprobs": 2},
        lambda reply: len(reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2,
    ),
    "langchain, structured": (
        CHAT,
        {
            "messages": said(PORT),
            "tools": PORT_TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "n": 1,
            "stream": False,
            "temperature": 0.0,
        },
        lambda reply: message(reply)["tool_calls"][0]["function"]["name"] in ("tide", "wind"),
    ),
    "litellm": (
        CHAT,
        {
            "messages": [
                {
                    "role": "user",
                    "content": PORT,
                    "name": None,
                    "cache_control": {"type": "ephemeral"},
                }
            ],
            "tools": [],
            "tool_choice": "auto",
            "user": "42",
            "extra_body": {},
            "stream": False,
        },
        is_port,
    ),
    "lm-eval, likelihood": (
        TEXT,
        {
            "prompt": [[1520, 314, 6], [1520, 314, 7, 8]],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
        lambda reply: [len(c["logprobs"]["token_logprobs"]) for c in reply["choices"]] == [4, 5],
    ),
    "lm-eval, generation": (
        TEXT,
        {
            "prompt": [PORT, TIDE],
            "max_tokens": 5,
            "temperature": 0,
            "stop": ["Question:", "</s>", "<|im_end|>", "\n\n", "Q:", "###"],
            "seed": 1234,
        },
        lambda reply: [choice["index"] for choice in reply["choices"]] == [0, 1],
    ),
    "lm-eval, chat": (
        CHAT,
        {
            "messages": [{"role": "user", "content": PORT, "type": "text"}],
            "max_tokens": 60,
            "temperature": 0,
            "stop": ["Question:", "</s>", "Q:", "###", "Problem:"],
            "seed": 1234,
        },
        is_port,
    ),
    "continue": (
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": PORT}]}],
            "max_tokens": 500,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": ["<|im_end|>", "<|endoftext|>", "/src/", "#- coding: utf-8", "```"],
            "tools": None,
        },
        streams_port,
    ),
    "continue, completion": (
        TEXT,
        {
            "prompt": "def add(",
            "max_tokens": 4,
            "temperature": 0.01,
            "suffix": "",
            "stop": ["\n\n"] * 8,
        },
        lambda reply: 1 <= reply["usage"]["completion_tokens"] <= 4,
    ),
    "open webui": (
        CHAT,
        {
            "messages": said(PORT),
            "stream": True,
            "stream_options": {"include_usage": True},
            "features": {"web_search": False},
            "chat_id": "c-1",
            "session_id": "s-1",
            "id": "m-1",
            "background_tasks": {"title_generation": True},
            "params": {},
            "variables": {"{{USER_NAME}}": "x"},
        },
        streams_port,
    ),
    "lm studio": (
        CHAT,
        {
            "messages": said(PORT),
            "max_tokens": -1,
            "ttl": 300,
            "top_k": 40,
            "min_p": 0.05,
            "repeat_penalty": 1.0,
            "temperature": 0.0,
        },
        is_port,
    ),
    "lm studio, schema": (
        CHAT,
        {
            "messages": said(PORT),
            "max_tokens": -1,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "sure", "strict": "true", "schema": SCHEMA},
            },
        },
        is_sure,
    ),
    "llama.cpp": (
        CHAT,
        {
            "messages": said(PORT),
            "cache_prompt": True,
            "id_slot": -1,
            "samplers": ["top_k", "temperature"],
            "typical_p": 1,
            "mirostat": 0,
            "timings_per_token": True,
            "grammar": "",
        },
        is_port,
    ),
    "vllm": (
        CHAT,
        {
            "messages": said(PORT),
            "chat_template_kwargs": {"enable_thinking": True},
            "top_k": -1,
            "repetition_penalty": 1.0,
            "stop_token_ids": [0],
            "skip_special_tokens": True,
            "add_generation_prompt": True,
            "guided_json": None,
            "min_tokens": 0,
        },
        is_port,
    ),
    "vllm, benchmark": (
        TEXT,
        {"prompt": "A", "max_tokens": 20, "ignore_eos": True, "temperature": 0.0, "best_of": 1},
        ends_after(20),
    ),
    "responses": (
        RESPONSES,
        {
            "input": PORT,
            "store": True,
            "max_output_tokens": 60,
            "truncation": "disabled",
            "include": [],
        },
        lambda reply: (
            [item["type"] for item in reply["output"]] == ["reasoning", "message"]
            and reply["output"][1]["content"][0]["text"] == "Brest is a port."
        ),
    ),
    "responses, parts": (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": PORT}]}]},
        lambda reply: reply["output"][-1]["content"][0]["text"] == "Brest is a port.",
    ),
    "responses, tools": (
        RESPONSES,
        {
            "input": [{"type": "message", "role": "user", "content": TIDE}],
            "tools": [
                {"type": "function", "strict": None, **one["function"]} for one in PORT_TOOLS
            ],
            "reasoning": {"effort": "low", "summary": "auto"},
        },
        lambda reply: (
            reply["output"][-1]["name"] == "tide"
            and json.loads(reply["output"][-1]["arguments"]) == {"port": "Brest"}
        ),
    ),
    "an older chat": (
        CHAT,
        {"messages": said(PORT), "functions": None, "function_call": "none", "logit_bias": {}},
        is_port,
    ),
    "an older call": (
        CHAT,
        {
            "messages": [
                *said(TIDE),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "tide", "arguments": '{"port": "Brest"}'},
                    "reasoning_content": "The port is Brest.",
                },
                {"role": "function", "name": "tide", "content": '{"metres": 5}'},
            ],
            "tools": PORT_TOOLS,
        },
        lambda reply: message(reply)["content"] == "5 m.",
    ),
    "llama.cpp, schema": (
        CHAT,
        {
            "messages": said(PORT),
            "response_format": {"type": "json_object", "schema": SCHEMA},
            "reasoning_format": "auto",
            "seed": -1,
        },
        is_sure,
    ),
    "lm-eval, stops within thoughts": (
        CHAT,
        {"messages": said(PORT), "max_tokens": 60, "stop": ["\n\n", "It is"]},
        is_port,
    ),
    "stops within calls": (
        CHAT,
        {"messages": said(TIDE), "tools": PORT_TOOLS, "stop": ["}", "\n"]},
        calls_tide,
    ),
    "a stop": (
        CHAT,
        {"messages": said(PORT), "stop": [" port"]},
        lambda reply: message(reply)["content"] == "Brest is a",
    ),
    "responses, settings": (
        RESPONSES,
        {
            "input": PORT,
            "stop": [" port"],
            "text": {"format": {"type": "text"}},
            "tools": [{"type": "function", "strict": True, **PORT_TOOLS[0]["function"]}],
            "tool_choice": "none",
        },
        lambda reply: (
            reply["output"][-1]["content"][0]["text"] == "Brest is a"
            and (reply["tool_choice"], reply["tools"][0]["strict"]) == ("none", True)
        ),
    ),
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
# What would change the answer and cannot be done, and what the message says to send instead.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "suffix": (TEXT, {"prompt": "def", "suffix": "return"}, "suffix: .*send prompt alone"),
    "pictures": (
        CHAT,
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "image_url.*send parts of the type text",
    ),
    "functions": (CHAT, {"messages": said("x"), "functions": [{"name": "f"}]}, "send tools"),
    "guided_regex": (CHAT, {"messages": said("x"), "guided_regex": "a+"}, "send response_format"),
    "best_of": (TEXT, {"prompt": "x", "best_of": 3}, "send n and choose"),
    "min_tokens": (CHAT, {"messages": said("x"), "min_tokens": 5}, "leave it out"),
    "misspelt": (CHAT, {"messages": said("x"), "max_token": 5}, "did you mean max_tokens"),
    "another misspelt": (
        CHAT,
        {"messages": said("x"), "temprature": 1},
        "did you mean temperature",
    ),
    "no such tool": (
        CHAT,
        {
            "messages": said("x"),
            "tools": PORT_TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "storm"}},
        },
        "must be one of tools: tide, wind",
    ),
    "a tool that is no function": (
        CHAT,
        {"messages": said("x"), "tools": [{"type": "web_search"}]},
        "only functions are called",
    ),
    "required without tools": (
        CHAT,
        {"messages": said("x"), "tool_choice": "required"},
        "required needs tools",
    ),
    "tools and a schema": (
        CHAT,
        {"messages": said("x"), "tools": PORT_TOOLS, "response_format": {"type": "json_object"}},
        "send tool_choice none or required",
    ),
    "broken arguments": (
        CHAT,
        {
            "messages": [
                *said("x"),
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                },
                *said("y"),
            ]
        },
        "not the JSON text of an object",
    ),
    "a broken schema": (
        CHAT,
        {
            "messages": said("x"),
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "heart"}}}
            ],
            "tool_choice": "required",
        },
        "tools: ",
    ),
    "a stored response": (RESPONSES, {"input": "x", "previous_response_id": "r"}, "send the whole"),
    "an output without a call": (
        RESPONSES,
        {"input": [{"type": "function_call_output", "output": "5"}]},
        "lacks its call_id",
    ),
    "bias outside": (
        CHAT,
        {"messages": said("x"), "logit_bias": {"999999": 1}},
        "outside the vocabulary",
    ),
    "nothing": (TEXT, {"prompt": "x", "max_tokens": 0}, "send at least 1"),
    "another route's limit": (RESPONSES, {"input": "x", "max_tokens": 5}, "send max_output_tokens"),
    "another route's limit, too": (
        CHAT,
        {"messages": said("x"), "max_output_tokens": 5},
        "send max_tokens",
    ),
    "another route's field": (
        CHAT,
        {"messages": said("x"), "echo": True},
        "one of /v1/completions",
    ),
    "a schema of a text": (
        TEXT,
        {"prompt": "x", "response_format": {"type": "json_object"}},
        "one of /v1/chat/completions",
    ),
    "many turns": (
        RESPONSES,
        {"input": [{"role": "user", "content": "x"}] * 1024, "instructions": "a"},
        "input: ",
    ),
    "a name with a mark": (
        CHAT,
        {"messages": said("x"), "tools": [{"function": {"name": "f<|im_end|>"}}]},
        "holds a special token",
    ),
    "no object": (
        CHAT,
        {
            "messages": said("x"),
            "tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}],
        },
        "must be of the type object",
    ),
    "a template of one's own": (
        CHAT,
        {"messages": said("x"), "chat_template": "{{ x }}"},
        "serve the model",
    ),
    "the whole of a text and a chat": (
        "/tokenize",
        {"prompt": "x", "messages": said("x")},
        "either prompt",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_clients_are_answered(server: Process, name: str) -> None:
    path, body, is_right = BODIES[name]
    reply = post(server, path, body)
    assert reply.status_code == 200, reply.text
    content = events_of(reply.text) if body.get("stream") else reply.json()
    assert is_right(content), content
    if not body.get("stream"):
        kind: Any = {CHAT: ChatCompletion, RESPONSES: Response}.get(path)
        assert kind is None or kind.model_validate(content)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_with_a_way_out(server: Process, name: str) -> None:
    path, body, advice = REFUSED[name]
    reply = post(server, path, body)
    assert reply.status_code == 400, reply.text
    assert re.search(advice, reply.json()["error"]["message"]), reply.text


def test_what_is_ignored_is_named(server: Process) -> None:
    names = {
        name: post(server, path, body).headers.get(IGNORED, "")
        for name, (path, body, _) in BODIES.items()
        if name
        in ("openai", "openai, reasoning model", "litellm", "lm studio", "vllm", "responses")
    }
    assert names["openai"] == ""
    assert names["openai, reasoning model"] == "store, metadata, verbosity, reasoning_effort"
    assert names["litellm"] == "extra_body, messages.cache_control"
    assert names["lm studio"] == "ttl"
    assert names["vllm"].endswith("chat_template_kwargs.enable_thinking")
    assert names["responses"] == "store, truncation, include"
    odd = {"é\r\nx": 1, "zzz ": 1, "": 1, " ": 1}
    reply = post(server, CHAT, {"messages": said("x"), "max_tokens": 1, **odd})
    assert reply.headers[IGNORED] == "???x, zzz?, ?, ?"
    reply = post(server, "/detokenize", {"tokens": [5], "skip_special_tokens": True})
    assert reply.headers[IGNORED] == "skip_special_tokens"
    turn = {"role": "user", "content": "x", "reasoning_content": "y", "tool_calls": []}
    reply = post(server, CHAT, {"messages": [turn], "max_tokens": 1})
    assert reply.headers[IGNORED] == "messages.reasoning_content"


def test_every_known_harmless_key_is_told_from_a_misspelt_one(server: Process) -> None:
    keys = [
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "prediction",
        "priority",
        "request_id",
        "cache_salt",
        "spaces_between_special_tokens",
        "return_token_ids",
        "draft_model",
        "keep_alive",
        "think",
        "provider",
        "transforms",
        "route",
        "models",
        "model_item",
        "stream_usage",
        "num_ctx",
        "top_n_tokens",
        "seed_id",
    ]
    reply = post(server, CHAT, {"messages": said("x"), "max_tokens": 1, **dict.fromkeys(keys, 1)})
    assert reply.status_code == 200, reply.text
    assert reply.headers[IGNORED].split(", ") == keys


@pytest.mark.parametrize("question", [TIDE, ALL, PORT])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_stream_says_what_the_whole_answer_says(
    client: openai.OpenAI, question: str, parallel: bool
) -> None:
    options: dict[str, Any] = {"model": "tools", "messages": said(question), "max_tokens": 120}
    if question != PORT:
        options |= {"tools": PORT_TOOLS, "parallel_tool_calls": parallel}
    whole = create(client, **options)
    choice = whole.choices[0]
    text, thoughts, reason = "", "", None
    calls: dict[int, list[str]] = {}
    for chunk in create(client, stream=True, **options):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        thoughts += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            parts = calls.setdefault(call.index, ["", "", ""])
            for number, part in enumerate((call.id, call.function.name, call.function.arguments)):
                parts[number] += part or ""
        reason = chunk.choices[0].finish_reason or reason
    assert text == (choice.message.content or "")
    assert thoughts == (getattr(choice.message, "reasoning_content", None) or "")
    made = choice.message.tool_calls or []
    assert [parts[1:] for _, parts in sorted(calls.items())] == [
        [call.function.name, call.function.arguments] for call in made
    ]
    assert reason == choice.finish_reason == ("stop" if question == PORT else "tool_calls")
    assert len(made) == {TIDE: 1, ALL: 2 if parallel else 1, PORT: 0}[question]
    identities = [call.id for call in made] + [parts[0] for parts in calls.values()]
    assert len(set(identities)) == len(identities)


def test_tools_that_may_not_be_called_are_not_there(client: openai.OpenAI) -> None:
    plain = create(client, model="tools", messages=said(PORT), max_tokens=60)
    none = create(
        client,
        model="tools",
        messages=said(PORT),
        max_tokens=60,
        tools=PORT_TOOLS,
        tool_choice="none",
    )
    assert none.choices[0].message.content == plain.choices[0].message.content == "Brest is a port."
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


def test_calls_that_are_cut_are_text(client: openai.OpenAI) -> None:
    reply = create(
        client,
        model="tools",
        messages=said(TIDE),
        max_tokens=24,
        tools=PORT_TOOLS,
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "length"
    assert not choice.message.tool_calls
    assert choice.message.content.startswith("<tool_call>")
    assert choice.message.reasoning_content == "The port is Brest."


def test_required_calls_follow_their_schemas(client: openai.OpenAI) -> None:
    """Also where the model would rather say something else."""
    ports, days = ["Brest", "Nantes"], [1, 2]  # so that each call comes to its end
    parameters = {
        "type": "object",
        "properties": {"port": {"enum": ports}, "days": {"enum": days}},
        "required": ["port"],
    }
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("tide", "wind")
    ]
    for seed in range(3):
        reply = create(
            client,
            model="tools",
            messages=said(PORT),
            tools=tools,
            tool_choice="required",
            temperature=1.5,
            seed=seed,
            max_tokens=400,
            parallel_tool_calls=False,
        )
        (call,) = reply.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("tide", "wind")
        assert arguments.keys() <= {"port", "days"}
        assert arguments["port"] in ports
        assert arguments.get("days", 1) in days


def test_responses_of_openais_client(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": False, **one["function"]} for one in PORT_TOOLS]
    first = client.responses.create(model="tools", input=TIDE, tools=tools)
    assert first.status == "completed"
    call: Any = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "tide",
        {"port": "Brest"},
    )
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"metres": 5}'}
    history: Any = [*said(TIDE), *(item.model_dump() for item in first.output), output]
    second = client.responses.create(model="tools", input=history, tools=tools)
    assert second.output_text == "5 m."
    cut = client.responses.create(model="tools", input=PORT, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    kinds, text = [], ""
    with client.responses.stream(model="tools", input=PORT) as stream:
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
        final = stream.get_final_response()
    assert final.output_text == text == "Brest is a port."
    assert [kind for kind in dict.fromkeys(kinds) if "delta" in kind] == [
        "response.reasoning_text.delta",
        "response.output_text.delta",
    ]
    with client.responses.stream(model="tools", input=ALL, tools=tools) as stream:
        arguments = [
            e.arguments for e in stream if e.type == "response.function_call_arguments.done"
        ]
        assert len(stream.get_final_response().output) == 3
    assert [json.loads(one) for one in arguments] == [
        {"port": "Brest"},
        {"port": "Brest", "days": 2},
    ]


WIDE = {"type": "object", "properties": {f"name_{n}": {"type": "integer"} for n in range(8000)}}


@pytest.mark.slow
def test_a_response_that_fails_says_so_to_openais_client(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": WIDE}}
    *_, last = client.responses.create(model="tools", input=PORT, text=form, stream=True)
    assert last.type == "error"
    assert "followed any further" in last.message


def test_schemas_of_tools_as_they_are(client: openai.OpenAI) -> None:
    """Keywords that a grammar cannot hold, parts put together, definitions, and properties with names of keywords."""
    parts: list[dict[str, Any]] = [
        {
            "allOf": [{"$ref": "#/$defs/B"}],
            "properties": {"c": {"type": "string"}},
            "required": ["b", "c"],
        },
        {"properties": {"default": {"$ref": "#/$defs/B"}}, "$id": "urn:x"},
        {
            "properties": {
                "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
            }
        },
        {"properties": {"x": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
    ]
    b = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    for parameters in parts:
        schema = {"type": "object", "$defs": {"B": b}, **parameters}
        reply = create(
            client,
            model="tools",
            messages=said("x"),
            tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=200,
        )
        assert reply.choices[0].finish_reason in ("tool_calls", "length")


def test_offsets_are_those_of_characters(client: openai.OpenAI) -> None:
    prompt = "a 𓀀𓀀 b 🜁 end"
    reply: Any = client.completions.create(
        model="tools", prompt=prompt, max_tokens=0, echo=True, logprobs=1
    )
    scores = reply.choices[0].logprobs
    place = scores.tokens.index(" end")
    assert scores.text_offset[place] == prompt.index(" end")


def test_tokens_are_those_of_the_prompt(server: Process) -> None:
    chat = {"messages": said(TIDE), "tools": PORT_TOOLS}
    tokens = post(server, "/tokenize", chat).json()
    reply = post(server, CHAT, {**chat, "max_tokens": 1}).json()
    assert tokens["count"] == len(tokens["tokens"]) == reply["usage"]["prompt_tokens"]
    assert tokens["max_model_len"] == 1024
    text = post(server, "/detokenize", {"tokens": tokens["tokens"]}).json()
    assert text["prompt"] == text["content"]
    assert text["prompt"].endswith(f"{TIDE}<|im_end|>\n<|im_start|>assistant\n")
    words = post(server, "/tokenize", {"content": "Is it?", "return_token_strs": True}).json()
    assert "".join(words["token_strs"]) == "Is it?"
    named = httpx.post(f"{server.url}/tokenize", json={"prompt": "x"}).json()
    assert named["count"] == 1


def test_scores_of_a_prompt_are_those_of_its_continuations(client: openai.OpenAI) -> None:
    """Whatever is cached, and however long: an echo of many pieces."""
    prompt = "The port of Brest is in France. " * 20
    echoed: Any = client.completions.create(
        model="tools", prompt=prompt, max_tokens=2, echo=True, logprobs=2, temperature=0
    )
    scores = echoed.choices[0].logprobs
    assert echoed.choices[0].text.startswith(prompt)
    assert "".join(scores.tokens) == echoed.choices[0].text
    assert scores.token_logprobs[0] is None
    assert [scores.text_offset[n] for n in (0, 1)] == [0, len(scores.tokens[0])]
    again: Any = client.completions.create(
        model="tools", prompt=prompt, max_tokens=2, logprobs=2, temperature=0
    )
    assert scores.tokens[-2:] == again.choices[0].logprobs.tokens
    alone: Any = client.completions.create(
        model="tools", prompt=prompt, max_tokens=0, echo=True, logprobs=2
    )
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        scores.token_logprobs[1:-2], abs=1e-4
    )
    part = len(scores.tokens) // 2
    lead = "".join(scores.tokens[:part])
    following: Any = client.completions.create(
        model="tools", prompt=lead, max_tokens=1, logprobs=2, temperature=0
    )
    best = max(scores.top_logprobs[part].values())
    assert following.choices[0].logprobs.token_logprobs[0] == pytest.approx(best, abs=1e-4)
    streamed: Any = client.completions.create(
        model="tools",
        prompt=prompt,
        max_tokens=2,
        echo=True,
        logprobs=2,
        temperature=0,
        stream=True,
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
