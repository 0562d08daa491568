"""Owns what becomes of request keys that are not understood: harmless ones are named, others are refused."""

from __future__ import annotations

import re
from typing import Any

from halfbyte.serve.fields import Body
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.response_schema import ResponsesRequest
from halfbyte.serve.schema import ChatRequest, CompletionRequest

HEADER = "x-halfbyte-ignored"
MAX_NAMED = 24
MAX_NAME = 64
MIN_MISSPELT = 4  # characters of a key that may be another's misspelling
LONG = 8  # characters of a key in which two may be wrong
MAX_EDITS = 2
HARMLESS = ("models",)  # OpenRouter's, and no misspelling
JSON_SCHEMA = "send response_format {type: json_schema, json_schema: {name, schema}}"
MAX_TOKENS = "send max_tokens"
ONE_TEXT = "generate two texts and choose by logprobs"
SAMPLER = "send temperature, top_p, top_k or min_p"
TEXT_ONLY = "only text is answered; leave it out"
WHOLE_INPUT = "send the whole conversation as input; nothing is stored here"
# Keys that would change the answer: the values that say nothing, and what to send instead of others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "send tools"),
    "function_call": (("none", "auto"), "send tools and tool_choice"),
    "suffix": (
        ("",),
        "send prompt alone, with the model's own fill-in-the-middle marks if it has any",
    ),
    **dict.fromkeys(("guided_json", "json_schema", "schema"), ((), JSON_SCHEMA)),
    **dict.fromkeys(("guided_regex", "guided_grammar", "grammar", "format"), (("",), JSON_SCHEMA)),
    **dict.fromkeys(("guided_choice", "structured_outputs"), (([], {}), JSON_SCHEMA)),
    **dict.fromkeys(("n_predict", "max_new_tokens", "max_length"), ((-1,), MAX_TOKENS)),
    **dict.fromkeys(("min_tokens", "min_new_tokens"), ((0,), "leave it out and send max_tokens")),
    "options": (({},), "send its settings as keys of the body"),
    "prompt_logprobs": ((0, False), "send echo and logprobs to /v1/completions"),
    "n_probs": ((0,), "send logprobs and top_logprobs"),
    "continue_final_message": ((False,), "send the text so far to /v1/completions"),
    "add_generation_prompt": ((True,), "leave it out: an answer needs the prompt"),
    "chat_template": (("",), "serve the model with the template that it was trained with"),
    "documents": (([],), "put what the model should know into the messages"),
    "skip_special_tokens": ((True,), "leave it out: markup of thoughts and calls is read for you"),
    "include_stop_str_in_output": ((False,), "append the stop string yourself"),
    "stop_sequences": (([],), "send stop"),
    "use_beam_search": ((False,), "send n with a temperature"),
    "length_penalty": ((1,), ONE_TEXT),
    **dict.fromkeys(
        ("bad_words", "allowed_token_ids", "logits_processors"), (([],), "send logit_bias")
    ),
    **dict.fromkeys(("typical_p", "typ_p", "typical", "top_a", "tfs_z"), ((0, 1), SAMPLER)),
    **dict.fromkeys(
        ("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), ((0,), SAMPLER)
    ),
    **dict.fromkeys(("previous_response_id", "conversation"), ((), WHOLE_INPUT)),
    "background": ((False,), "leave it out and stream"),
    "web_search_options": ((), "put what the model should know into the messages"),
    **dict.fromkeys(("audio", "modalities", "images"), ((["text"], []), TEXT_ONLY)),
    **dict.fromkeys(
        ("truncation", "truncate_prompt_tokens"),
        (("disabled",), "shorten the input yourself, so that you know what is left out"),
    ),
}
# Fields of one route that another does not have: sent there, they would change the answer too.
ROUTES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}
SAYS_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {}, "auto", "none")
OTHER_NAMES = {
    "max_tokens": ("max_output_tokens",),
    "max_completion_tokens": ("max_output_tokens", "max_tokens"),
    "max_output_tokens": ("max_tokens",),
    "response_format": ("text",),
    "messages": ("input",),
    "reasoning_effort": ("reasoning",),
    "text": ("response_format",),
}


def account(body: Body) -> list[str]:
    """Return the keys of a request that have no effect, in order.

    Raises:
        RefusedError: a key would change the answer and is not understood, or is misspelt.
    """
    named = []
    for path, value in body.others():
        key = path.rpartition(".")[2]
        if value is None:
            continue
        if path == key:
            _refuse(body, key, value)
        named.append(path)
    return list(dict.fromkeys(named))


def _refuse(body: Body, key: str, value: Any) -> None:
    """Refuse a key of a request that would change the answer, or is misspelt."""
    known = type(body).model_fields
    if key in REFUSED:
        neutral, advice = REFUSED[key]
        if not any(value == one and type(value) is type(one) for one in neutral):
            raise RefusedError(400, f"{key}: is not supported here; {advice}", key)
        return
    routes = [route for route, request in ROUTES.items() if key in request.model_fields]
    if routes and value not in SAYS_NOTHING:
        names = [name for name in OTHER_NAMES.get(key, ()) if name in known]
        advice = f"send {names[0]}" if names else f"it is one of {' and '.join(routes)}"
        raise RefusedError(400, f"{key}: is no field of this route; {advice}", key)
    if routes or len(key) < MIN_MISSPELT or key in HARMLESS:
        return
    allowed = MAX_EDITS if len(key) >= LONG else 1
    alike = next((name for name in known if _edits(key[:MAX_NAME], name) <= allowed), None)
    if alike:
        raise RefusedError(400, f"{key[:MAX_NAME]}: unknown; did you mean {alike}?", key)


def _edits(one: str, other: str) -> int:
    """Return by how many characters to add, drop or replace two words differ."""
    row = list(range(len(other) + 1))
    for number, char in enumerate(one, start=1):
        above, row[0] = row[0], number
        for at, other_char in enumerate(other, start=1):
            cost = min(row[at] + 1, row[at - 1] + 1, above + (char != other_char))
            above, row[at] = row[at], cost
    return row[-1]


def header(named: list[str]) -> dict[str, str]:
    """Return the response header that names keys without effect; {} if there are none."""
    if not named:
        return {}
    shown = [re.sub(r"[^!-~]|[,:]", "?", name[:MAX_NAME]) or "?" for name in named[:MAX_NAMED]]
    rest = [f"and {len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
    return {HEADER: ", ".join([*shown, *rest])}
