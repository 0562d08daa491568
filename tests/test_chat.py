"""Two answers beside each other on a terminal."""

from __future__ import annotations

from halfbyte.data.conversation import Message
from halfbyte.eval.chat import Reply, chat, reply_lines


def replies(**texts: str) -> dict[str, Reply]:
    return {name: Reply(text, 2, 1.0, "stop") for name, text in texts.items()}


def test_answers_stand_side_by_side_and_lose_no_word() -> None:
    left, right = "one two " * 20, "three\n\nfour"
    lines = reply_lines(replies(base=left, tuned=right), 83)
    assert all(len(line) <= 83 and line[40:43].rstrip() == " |" for line in lines)
    columns = list(zip(*(line.split(" |") for line in lines), strict=True))
    assert " ".join(columns[0]).split() == [
        "base>",
        *left.split(),
        "(2",
        "tokens,",
        "2.0",
        "tokens/s)",
    ]
    assert [part.strip() for part in columns[1][:4]] == ["tuned>", "three", "", "four"]
    assert columns[1][-1].strip() == "(2 tokens, 2.0 tokens/s)"


def test_narrow_terminals_and_other_scripts_get_one_after_the_other() -> None:
    for columns, text in ((50, "one"), (200, "قلب"), (200, "心臓")):
        lines = reply_lines(replies(base=text, tuned="two"), columns)
        assert lines[0] == f"base> {text}"
        assert lines[2] == "tuned> two"


def test_one_answer_is_as_wide_as_it_is() -> None:
    assert reply_lines(replies(model="x" * 300), 80)[0] == "model> " + "x" * 300


def test_thoughts_are_folded_until_they_are_asked_for() -> None:
    asked: list[tuple[Message, ...]] = []

    def respond(messages: tuple[Message, ...]) -> Reply:
        asked.append(messages)
        return Reply("4", 9, 1.0, "stop", "Two and two.")

    lines: list[str] = []
    typed = iter(["/thoughts", "2 + 2?", "/thoughts", "Sure?", "/quit"])
    chat({"tuned": respond}, None, lambda _: next(typed), lines.append)
    assert lines[1:4] == [
        "tuned> 4",
        "       (9 tokens, 9.0 tokens/s; /thoughts shows its 3 words)",
        "tuned> Two and two.",
    ]
    assert asked[1][1] == Message("assistant", "4", "Two and two.")
