"""Owns scoring an answer against its row: its text and its tool calls, whoever made it and wherever."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from halfbyte.config import Run
from halfbyte.config.evaluation import Eval
from halfbyte.data.answer_format import AnswerFormat, ParsedAnswer
from halfbyte.data.call_format import schemas_of
from halfbyte.data.conversation import Row, ToolCall, tools_of
from halfbyte.data.thoughts import without_thoughts
from halfbyte.errors import UserError
from halfbyte.scoring.metrics import is_valid, same_json, scorer

LOSS_METRIC = "held_out_loss"
RowScore = Callable[[ParsedAnswer, Row], float]  # maps an answer and its row to 0 to 1
TOOL_METRICS = ("tool_match", "tool_valid")
NO_CALL, EXTRA_CALL = "no call of {}", "a call of {} that is not wanted"


def row_scorer(metric: str, settings: Eval) -> RowScore:
    """Return a metric's function (answer, row) → score.

    Thoughts are left out. Where the row or the answer calls tools, a metric of the text counts only if the
    calls are the wanted ones too.

    Args:
        metric: the name of an answer metric in ``eval.metrics``.
        settings: as for ``metrics.scorer``.

    Raises:
        UserError: as ``metrics.scorer``.
    """
    if metric == "tool_match":
        return lambda answer, row: tool_match(answer.calls, row)
    if metric == "tool_valid":
        valid = _validator()
        return lambda answer, row: valid(answer.calls, row)
    score = scorer(metric, settings)

    def of_text(answer: ParsedAnswer, row: Row) -> float:
        wanted = without_thoughts(row.answer)
        if not (answer.calls or row.messages[-1].tool_calls):
            return score(answer.content, wanted)
        if tool_match(answer.calls, row) < 1:
            return 0.0
        return score(answer.content, wanted) if wanted or answer.content else 1.0

    return of_text


def parse_answers(
    answers: Sequence[str], rows: Sequence[Row], form: AnswerFormat
) -> list[ParsedAnswer]:
    """Read answers to rows in the parts in which they are scored."""
    return [form.parse(text, row.tools) for text, row in zip(answers, rows, strict=True)]


def answer_scores(
    answers: Sequence[ParsedAnswer], rows: Sequence[Row], run: Run
) -> dict[str, list[float]]:
    """Score each answer by each of the run's metrics except the loss."""
    return {
        metric: [score(*pair) for pair in zip(answers, rows, strict=True)]
        for metric, score in row_scorers(run).items()
    }


def mean_score(answers: Sequence[str], rows: Sequence[Row], form: AnswerFormat, run: Run) -> float:
    """Return the mean score of answers to rows by the first of the run's metrics."""
    score = row_scorer(run.eval.metrics[0], run.eval)
    parsed = parse_answers(answers, rows, form)
    return sum(score(*pair) for pair in zip(parsed, rows, strict=True)) / len(rows)


def row_scorers(run: Run) -> dict[str, RowScore]:
    """Return the function of each of the run's metrics except the loss.

    Raises:
        UserError: as ``row_scorer``.
    """
    metrics = [metric for metric in run.eval.metrics if metric != LOSS_METRIC]
    return {metric: row_scorer(metric, run.eval) for metric in metrics}


def with_tool_metrics(run: Run, rows: Sequence[Row]) -> Run:
    """Return the run with the metrics of tools first, where its metrics are the default and rows call tools."""
    calls = any(row.messages and row.messages[-1].tool_calls for row in rows)
    if not calls or run.eval.metrics != Eval().metrics or run.eval.answer_pattern is not None:
        return run
    metrics = [*TOOL_METRICS, *run.eval.metrics]
    return run.model_copy(update={"eval": run.eval.model_copy(update={"metrics": metrics})})


def tool_match(calls: Sequence[ToolCall], row: Row) -> float:
    """Return 1 if the calls are the wanted ones in any order: the same names and equal arguments as JSON.

    Of a row that wants no call, no call is right.
    """
    return float(not tool_differences(calls, row))


def tool_differences(calls: Sequence[ToolCall], row: Row) -> list[str]:
    """Say how calls differ from the wanted ones, with the fields in which they do."""
    wanted = list(row.messages[-1].tool_calls)
    made = list(calls)
    for call in list(wanted):  # equal ones first, so that the rest is compared with what is left
        equal = next((one for one in made if _differing(one, call) == []), None)
        if equal is not None:
            made.remove(equal)
            wanted.remove(call)
    differences = []
    for call in wanted:
        named = [one for one in made if one.name == call.name]
        if not named:
            differences.append(NO_CALL.format(call.name))
            continue
        nearest = min(named, key=lambda one, call=call: len(_differing(one, call)))  # type: ignore[misc]
        made.remove(nearest)
        differences += [f"{call.name}.{field}" for field in _differing(nearest, call)]
    return differences + [EXTRA_CALL.format(call.name) for call in made]


def _differing(call: ToolCall, wanted: ToolCall) -> list[str]:
    """Return the arguments in which two calls differ; a different name is all of it."""
    if call.name != wanted.name:
        return ["name"]
    ours, theirs = json.loads(call.arguments), json.loads(wanted.arguments)
    return [
        field
        for field in sorted(ours.keys() | theirs.keys())
        if field not in ours or field not in theirs or not same_json(ours[field], theirs[field])
    ]


def count_differences(answers: Sequence[ParsedAnswer], rows: Sequence[Row]) -> dict[str, int]:
    """Count how the calls of answers differ from the wanted ones, the most frequent first."""
    counts: Counter[str] = Counter()
    for answer, row in zip(answers, rows, strict=True):
        counts.update(set(tool_differences(answer.calls, row)))
    return dict(counts.most_common())


def _validator() -> Callable[[Sequence[ToolCall], Row], float]:
    """Return a function that gives 1 if all calls name a tool of the row and keep to its schema.

    No call is valid only where none is wanted.

    Raises:
        UserError: jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError:
        raise UserError(
            "eval.metrics: tool_valid needs jsonschema: pip install 'halfbyte[metrics]'"
        ) from None

    def valid(calls: Sequence[ToolCall], row: Row) -> float:
        schemas: dict[str, Any] = schemas_of(tools_of(row.tools)) if row.tools else {}
        if not calls:
            return float(not row.messages[-1].tool_calls)
        for call in calls:
            if call.name not in schemas:
                return 0.0
            try:
                Draft202012Validator.check_schema(schemas[call.name])
            except SchemaError:
                continue  # what the row calls a schema is none: any arguments keep to it
            validator = Draft202012Validator(schemas[call.name])
            if not is_valid(validator, json.loads(call.arguments)):
                return 0.0
        return 1.0

    return valid
