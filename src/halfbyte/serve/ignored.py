"""Owns what becomes of request keys that are not understood: harmless ones are named, others are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from halfbyte.serve.fields import Body
from halfbyte.serve.refusal import RefusedError

HEADER = "x-halfbyte-ignored"
MAX_NAMED = 24
MAX_NAME = 64
HARMLESS = ("models",)  # OpenRouter's, and no misspelling
ALIKE = 0.84  # of names that are taken for one another's misspelling
JSON_SCHEMA = "send response_format {type: json_schema, json_schema: {name, schema}}"
MAX_TOKENS = "send max_tokens"
ONE_TEXT = "generate two texts and choose by logprobs"
SAMPLER = "send temperature, top_p, top_k or min_p"
TEXT_ONLY = "only text is answered; leave it out"
# Keys that would change the answer: the values that say nothing, and what to send instead of others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "send tools"),
    "function_call": (("none", "auto"), "send tools and tool_choice"),
    "suffix": (
        ("",),
        "send prompt alone, with the model's own fill-in-the-middle marks if it has any",
    ),
    **dict.fromkeys(("guided_json", "json_schema", "schema"), ((), JSON_SCHEMA)),
    **dict.fromkeys(("guided_regex", "guided_grammar", "grammar"), (("",), JSON_SCHEMA)),
    **dict.fromkeys(("guided_choice", "structured_outputs"), (([], {}), JSON_SCHEMA)),
    "format": (("",), JSON_SCHEMA),
    **dict.fromkeys(("n_predict", "max_new_tokens", "max_length"), ((-1,), MAX_TOKENS)),
    "min_tokens": ((0,), "leave it out and send max_tokens"),
    "options": (({},), "send its settings as keys of the body"),
    "prompt_logprobs": ((0, False), "send echo and logprobs to /v1/completions"),
    "continue_final_message": ((False,), "send the text so far to /v1/completions"),
    "add_generation_prompt": ((True,), "leave it out: an answer needs the prompt"),
    "skip_special_tokens": ((True,), "leave it out: markup of thoughts and calls is read for you"),
    "include_stop_str_in_output": ((False,), "append the stop string yourself"),
    "use_beam_search": ((False,), "send n with a temperature"),
    "length_penalty": ((1,), ONE_TEXT),
    "bad_words": (([],), "send logit_bias"),
    "logits_processors": (([],), "send logit_bias"),
    **dict.fromkeys(("typical_p", "typical", "top_a", "tfs_z"), ((0, 1), SAMPLER)),
    **dict.fromkeys(
        ("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), ((0,), SAMPLER)
    ),
    "previous_response_id": ((), "send the whole conversation as input; nothing is stored here"),
    "conversation": ((), "send the whole conversation as input; nothing is stored here"),
    "prompt_id": ((), "send input and instructions"),
    "background": ((False,), "leave it out and stream"),
    "web_search_options": ((), "put what the model should know into the messages"),
    "audio": ((), TEXT_ONLY),
    "modalities": ((["text"],), TEXT_ONLY),
    "images": (([],), TEXT_ONLY),
    "truncation": (("disabled",), "shorten the input yourself, so that you know what is left out"),
}


def account(body: Body, ignored: Iterable[str] = ()) -> list[str]:
    """Return the keys of a request that have no effect, in order.

    Args:
        body: the request.
        ignored: further ones.

    Raises:
        RefusedError: a key would change the answer and is not understood, or is misspelt.
    """
    named = list(ignored)
    known = sorted(type(body).model_fields)
    for path, value in body.others():
        key = path.rpartition(".")[2]
        if value is None:
            continue
        if path == key and key in REFUSED:
            neutral, advice = REFUSED[key]
            if not any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
            ):
                raise RefusedError(400, f"{key}: is not supported here; {advice}", key)
        elif path == key and key not in HARMLESS:
            alike = difflib.get_close_matches(key[:MAX_NAME], known, 1, ALIKE)
            if alike:
                raise RefusedError(400, f"{key[:MAX_NAME]}: unknown; did you mean {alike[0]}?", key)
        named.append(path)
    return list(dict.fromkeys(named))


def header(named: list[str]) -> dict[str, str]:
    """Return the response header that names keys without effect; {} if there are none."""
    if not named:
        return {}
    shown = [
        "".join(
            char if char.isascii() and char.isprintable() and char not in ",:" else "?"
            for char in name
        )[:MAX_NAME]
        for name in named[:MAX_NAMED]
    ]
    rest = [f"and {len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
    return {HEADER: ", ".join([*shown, *rest])}
