"""Owns the grammars of answers: JSON that follows a schema, one of several texts, tool calls in the template's markup."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.data.call_format import CallFormat, FieldCalls, NamedCalls, ObjectCalls
from halfbyte.data.conversation import tools_of
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError

PLAIN_JSON: Any = {"whitespace_flexible": False}
# As templates write JSON, and so as the calls that a model has learnt.
# Keywords that llguidance does not know are passed over: the schemas of tools often have some.
SPACED_JSON: Any = {
    **PLAIN_JSON,
    "lenient": True,
    "coerce_one_of": True,
    "item_separator": ", ",
    "key_separator": ": ",
}
# Keys of a JSON schema whose value has schemas by name, and those whose value is none.
NAMED_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties")
VALUES = ("const", "enum", "default", "examples")
MAX_ERROR_CHARS = 400
ANY_TEXT = r"/(.|\n)*/"


class GrammarError(Exception):
    """The grammar cannot be followed any further."""


def masked(matcher: Any, scores: torch.Tensor) -> torch.Tensor:
    """Return scores (V,) of tokens in which those that a grammar forbids are minus infinity.

    Raises:
        GrammarError: the grammar cannot be followed any further.
    """
    # llguidance.torch would compile C++ for this, so its bit mask is unpacked here.
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    check(matcher)
    allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(scores)]).bool()
    kept = torch.full_like(scores, float("-inf"))
    kept[: len(allowed)][allowed] = scores[: len(allowed)][allowed]
    return kept


def consume(matcher: Any, token: int) -> None:
    """Follow a grammar by a token.

    Raises:
        GrammarError: the grammar cannot be followed any further.
    """
    matcher.consume_token(token)
    check(matcher)


def follow(matcher: Any, token: int) -> list[int]:
    """Follow a grammar by a token, and by those that it then leaves no choice about; return them all.

    Raises:
        GrammarError: the grammar cannot be followed any further.
    """
    followed = [token]
    consume(matcher, token)
    while not matcher.is_stopped():
        forced = matcher.compute_ff_tokens()
        if not forced and matcher.is_accepting():
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            (allowed,) = np.unpackbits(bits, bitorder="little").nonzero()
            forced = [int(allowed[0])] if len(allowed) == 1 else []  # it can only end here
        if not forced:
            break
        for one in forced:
            consume(matcher, one)
        followed += forced
    return followed


def check(matcher: Any) -> None:
    """Raise a ``GrammarError`` if a grammar cannot be followed any further."""
    if matcher.is_error():
        raise GrammarError(str(matcher.get_error()).partition("\n")[0][:300])


class Grammars:
    """Makes the grammars of one model's answers.

    Args:
        renderer: the model's renderer.
        vocab_size: V of the model's logits.
        may_think: whether answers may begin with thoughts, where the template lets them.
    """

    def __init__(self, renderer: Renderer, vocab_size: int, *, may_think: bool = True) -> None:
        self.renderer, self.vocab_size, self.may_think = renderer, vocab_size, may_think

    def of_schema(self, schema: dict[str, Any], *, closer: str | None = None) -> Any:
        """Return llguidance's state of a grammar for answers that follow a JSON schema.

        Args:
            schema: the JSON schema.
            closer: what closes the thoughts that the prompt has opened; None if it has opened none.

        Raises:
            DataError: it is not a valid schema, or no answer can follow it.
        """
        return self._matcher(_json(schema, PLAIN_JSON), closer, "response_format")

    def of_texts(self, texts: Sequence[str], *, closer: str | None = None) -> Any:
        """Return llguidance's state of a grammar for answers that are one of several texts.

        Raises:
            DataError: there are no texts.
        """
        answer = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._matcher(f"text\ntext: {answer}", closer, "texts")

    def of_calls(
        self, tools: str, name: str | None, *, parallel: bool, closer: str | None = None
    ) -> Any:
        """Return llguidance's state of a grammar for answers that call tools.

        Args:
            tools: JSON text of the tools.
            name: the only one that may be called; None for any.
            parallel: whether there may be several calls.
            closer: as for ``of_schema``.

        Raises:
            DataError: a schema is not valid.
        """
        form = self.renderer.answer_format.calls
        assert form is not None
        functions = [tool["function"] for tool in tools_of(tools)]
        functions = [one for one in functions if name in (None, one["name"])]
        return self._matcher(self._calls(form, functions, parallel=parallel), closer, "tools")

    def _calls(self, form: CallFormat, functions: list[dict[str, Any]], *, parallel: bool) -> str:
        """Return the right side of the rule of an answer, and further rules, in llguidance's dialect of Lark."""
        opening, closing = self._literal(form.opening), self._literal(form.closing)
        schemas = [
            _closed_if_whole(function.get("parameters") or {"type": "object"})
            for function in functions
        ]
        names = [function["name"] for function in functions]
        if isinstance(form, ObjectCalls):
            # Each schema keeps its own definitions, to which its references lead.
            kept = {f"tool{n}": moved(schema, f"tool{n}") for n, schema in enumerate(schemas)}
            objects = [
                form.schema(name, {"$ref": f"#/$defs/{place}"})
                for name, place in zip(names, kept, strict=True)
            ]
            one: dict[str, Any] = {"anyOf": objects}
            if form.as_list:
                one = {"type": "array", "items": one, "minItems": 1}
                one |= {} if parallel else {"maxItems": 1}
            call = _json({**one, "$defs": kept}, SPACED_JSON)
        elif isinstance(form, NamedCalls):
            middle = self._literal(form.middle)
            call = " | ".join(
                f"{self._literal(name)} {middle} {_json(schema, SPACED_JSON)}"
                for name, schema in zip(names, schemas, strict=True)
            )
        else:
            assert isinstance(form, FieldCalls)
            # The values are free text, so only the name is certain.
            call = f"({' | '.join(map(self._literal, names))}) {ANY_TEXT}"
            return f"{opening} call\ncall: {call}"
        more = ""
        if parallel and form.separator is not None and not getattr(form, "as_list", False):
            more = f"({self._literal(form.separator)} call)*"
        return f"{opening} call {more} {closing}\ncall: {call}"

    def _thoughts(self, closer: str | None) -> str:
        """Return the rule of the thoughts before an answer; "" if there are none.

        Thoughts that the prompt has opened have to end. Those that the template lets an answer begin with are
        left to the model.
        """
        own = self.renderer.answer_format.own_marks
        if closer is not None:
            return f"thoughts: rest\n{self._rest(closer)}"
        if own is None or not self.may_think:
            return ""
        return f"thoughts: ({self._literal(own[0])} rest)?\n{self._rest(own[1])}"

    def _rest(self, closer: str) -> str:
        """Return the rule of what follows the mark that opens thoughts."""
        if self.renderer.special_tokens.pattern.search(closer):
            return f"rest: {ANY_TEXT} {self._literal(closer)} /[ \\n]*/"
        # As one terminal that ends as soon as it can: text alone would go on behind the mark.
        pattern = re.escape(closer).replace("/", "\\/")
        return f"rest: opened /[ \\n]*/\nopened[lazy]: /(.|\\n)*{pattern}/"

    def _literal(self, text: str) -> str:
        """Return a text as terminals, its special tokens as such."""
        ids = self.renderer.special_tokens.ids
        parts = self.renderer.special_tokens.split(text)
        terminals = [
            f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        ]
        return " ".join(terminals)

    def _matcher(self, answer: str, closer: str | None, field: str) -> Any:
        """Return the state of a grammar of thoughts, if there are any, and of the answer behind them."""
        from llguidance import LLMatcher

        thoughts = self._thoughts(closer)
        # As the template writes answers: Llama 2 has learnt them between spaces (dottxt-ai/outlines#1456).
        before, behind = (
            f"({json.dumps(space)})?" if space else ""
            for space in self.renderer.answer_format.spaces
        )
        answer, *rest = answer.split("\n", 1)
        rules = f"start: {'thoughts ' if thoughts else before} {answer} {behind}\n{thoughts}"
        rules = "\n".join([rules, *rest])
        try:
            matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(rules), log_level=0)
        except (ValueError, TypeError) as error:
            raise DataError(f"{field}: {_first_lines(error)}") from error
        if matcher.is_error():
            raise DataError(f"{field}: {_first_lines(matcher.get_error())}")
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise DataError(f"{field}: {matcher.get_error()}")
        for token in self.renderer.stop_ids:
            allowed &= ~(1 << token)
        if not allowed:  # for example a schema that refers only to itself
            raise DataError(f"{field}: no JSON value matches this schema")
        return matcher

    @functools.cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        stop_ids = self.renderer.stop_ids
        return from_tokenizer(
            self.renderer.tokenizer, n_vocab=self.vocab_size, eos_token=stop_ids[0]
        )


def _first_lines(error: object) -> str:
    """Return what is wrong with a grammar, without the grammar."""
    return str(error).partition("\n<")[0][:MAX_ERROR_CHARS]


def closed(schema: Any) -> Any:
    """Return a JSON schema in which objects have no properties but those it names, unless it says otherwise."""

    def close(one: dict[str, Any]) -> dict[str, Any]:
        has_names = isinstance(one.get("properties"), dict)
        return {"additionalProperties": False, **one} if has_names else one

    return _with_each(schema, close)


def moved(schema: Any, place: str) -> Any:
    """Return a JSON schema whose references to itself are right where it stands as a definition."""

    def move(one: dict[str, Any]) -> dict[str, Any]:
        reference = one.get("$ref")
        one = {key: value for key, value in one.items() if key != "$id"}
        if isinstance(reference, str) and reference.startswith("#"):
            one["$ref"] = f"#/$defs/{place}{reference[1:]}"
        return one

    return _with_each(schema, move)


def _with_each(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return a JSON schema in which each schema within it, and itself, is changed."""
    if isinstance(schema, list):
        return [_with_each(one, change) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner: dict[str, Any] = {}
    for key, value in schema.items():
        if key in NAMED_SCHEMAS and isinstance(value, dict):
            inner[key] = {name: _with_each(one, change) for name, one in value.items()}
        else:
            inner[key] = value if key in VALUES else _with_each(value, change)
    return change(inner)


def _closed_if_whole(schema: dict[str, Any]) -> dict[str, Any]:
    """Close a schema, unless it is put together of parts, each of which names properties of its own."""
    text = json.dumps(schema)
    made: dict[str, Any] = schema
    if '"allOf"' not in text and '"$dynamicRef"' not in text:
        made = closed(schema)
    return made


def _json(schema: dict[str, Any], style: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=False)}"
