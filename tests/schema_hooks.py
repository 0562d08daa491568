"""For schemathesis: names of models that are there, and short answers, so that valid requests are answered."""

from __future__ import annotations

from typing import Any

import schemathesis

NAMES = ("base", "first", "other", "tools")
MAX_TOKENS = 4
FEW = 1 << 17  # the schema's own bound: larger numbers stay what they are


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Leave what is invalid as it is."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return body
    if not 0 < len(body["model"]) <= 200:
        return body
    body["model"] = NAMES[len(body["model"]) % len(NAMES)]
    names = ("max_output_tokens",) if "input" in body else ("max_tokens", "max_completion_tokens")
    if all(body.get(name) in (None, -1) for name in names):
        body[names[0]] = MAX_TOKENS
    for name in names:
        if type(body.get(name)) is int and MAX_TOKENS < body[name] <= FEW:
            body[name] = MAX_TOKENS
    return body
