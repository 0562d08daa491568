"""Owns the order of turns: which may follow which, what is wrong with another order, and its named repairs."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.bounds import shorten
from halfbyte.data.conversation import OPENING_ROLES, Message
from halfbyte.data.fields import Account, RowError

MAX_ROLES_CHARS = 90


def repair(messages: list[Message], account: Account) -> list[Message]:
    """Return the turns after the repairs that are asked for, and count those that changed them."""
    repairs, repaired = account.repairs, account.repaired
    if not repairs:
        return messages
    opening = messages[:1] if messages and messages[0].role in OPENING_ROLES else []
    turns = messages[len(opening) :]
    if "drop_leading_assistant" in repairs:
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), len(turns))
        if first and all(turn.role == "assistant" for turn in turns[:first]):
            turns = turns[first:]
            repaired["drop_leading_assistant"] += 1
    if "merge_turns" in repairs:
        merged = _merge_turns(turns)
        repaired["merge_turns"] += len(merged) < len(turns)
        turns = merged
    if "drop_trailing_user" in repairs and turns and turns[-1].role == "user":
        while turns and turns[-1].role == "user":
            turns.pop()
        repaired["drop_trailing_user"] += 1
    return opening + turns


def _merge_turns(turns: list[Message]) -> list[Message]:
    """Join neighbouring turns of a user, or of an assistant, with a blank line between their texts."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if (
            last is None
            or turn.role not in ("user", "assistant")
            or (last.role, last.learnt, last.name) != (turn.role, turn.learnt, turn.name)
        ):
            merged.append(turn)
            continue
        merged[-1] = replace(
            last,
            content="\n\n".join(filter(None, [last.content, turn.content])),
            reasoning="\n\n".join(filter(None, [last.reasoning, turn.reasoning])) or None,
            tool_calls=last.tool_calls + turn.tool_calls,
        )
    return merged


NEXT_ROLES = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_order(place: str, column: str, messages: list[Message]) -> None:
    """Check that user and assistant alternate, tools answer the assistant, and the assistant comes last.

    Raises:
        RowError: they do not.
    """
    before = ""
    for number, message in enumerate(messages):
        if number == 0 and message.role in OPENING_ROLES:
            continue
        if message.role not in NEXT_ROLES[before]:
            order = shorten(", ".join(message.role for message in messages), MAX_ROLES_CHARS)
            reason, remedy = _order_fault(before, message.role)
            raise RowError(
                place,
                reason,
                f"{column} has the roles {order}; user and assistant must alternate,"
                f" after at most one system message{remedy}",
            )
        before = message.role
    if before != "assistant":
        remedy = (
            ", or set data.repair=[drop_trailing_user]"
            if before == "user" and len(messages) > 1
            else ""
        )
        raise RowError(
            place,
            "no assistant turn at the end",
            f"{column} ends without an assistant turn, so"
            f" there is nothing to learn; add the answer{remedy}",
        )


def _order_fault(before: str, role: str) -> tuple[str, str]:
    """Return the reason and the remedy for a turn that may not stand where it does."""
    if role in OPENING_ROLES:
        return (
            "a system message after the first turn",
            ". Move it to the front, or set data.on_malformed=drop",
        )
    if role == before:
        return f"two {role} turns in succession", ". data.repair=[merge_turns] joins neighbours"
    if before == "" and role == "assistant":
        return (
            "the assistant begins",
            ". data.repair=[drop_leading_assistant] leaves its greeting out",
        )
    return f"a {role} turn after {before or 'nothing'}", ", and a tool answers an assistant"


def check_learnt(messages: tuple[Message, ...], loss_on: str, place: str) -> None:
    """Check that the weights of turns leave something to learn, and that they can be followed.

    Raises:
        RowError: they do not.
    """
    if not any(message.learnt for message in messages if message.role == "assistant"):
        reason = "no answer is to be learnt"
        raise RowError(place, reason, f"{reason}: each has a weight of 0")
    if loss_on == "all" and not all(message.learnt for message in messages):
        raise RowError(
            place,
            "a weight of 0 with data.loss_on=all",
            "has a turn of weight 0, but data.loss_on=all learns every token; set completion or last",
        )
