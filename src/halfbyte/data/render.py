"""Owns rendering: conversations to ids and labels, the same way in training, evaluation and serving.

The text comes from the tokenizer's chat template. It is cut where an answer begins, so that the
ids before an answer are exactly the ids of the generation prompt, and each part is tokenised on
its own. Control tokens count only where the template wrote them: the same characters in a message
are tokenised as plain text (issue 2; transformers issue 29279).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.paths import TEMPLATE_NAMES
from halfbyte.config.schema import Data
from halfbyte.data.rows import Message, Row
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Supplementary private use area A: stands in for control strings while the template runs.
SENTINEL_START = 0xF0000
SENTINELS = re.compile("[\U000f0000-\U000ffffd]")
PROBE = (
    Message("user", "alpha"),
    Message("assistant", "beta"),
    Message("user", "gamma delta"),
    Message("assistant", "epsilon zeta"),
)


@dataclass(frozen=True)
class Encoded:
    """One row as token ids; ``labels[t]`` is ``ids[t]`` where it is learnt and -100 elsewhere.

    Attributes:
        changed: the template altered a message (such as trimming its ends).
        escaped: a message held the characters of a control token, now plain text.
    """

    place: str
    ids: list[int]
    labels: list[int]
    changed: bool = False
    escaped: bool = False

    @property
    def num_supervised(self) -> int:
        """Number of labelled tokens."""
        return sum(label != IGNORED for label in self.labels)


def renderer_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer that a config's ``data`` section asks for.

    Raises:
        DataError: as ``load_template`` and ``Renderer``.
    """
    template = load_template(data.chat_template) if data.chat_template else None
    return Renderer(tokenizer, template, data.loss_on)


def load_template(name: str) -> str:
    """The Jinja text of a named template or of a file.

    Raises:
        DataError: no such file.
    """
    if name in TEMPLATE_NAMES:
        return (
            resources.files("halfbyte.data").joinpath(f"templates/{name}.jinja").read_text("utf-8")
        )
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template: {name} cannot be read: {error.strerror}") from None


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    Sets ``tokenizer.chat_template``, so that what is saved with the model is what was trained.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own, or None to keep that.
        loss_on: ``completion`` labels assistant turns with their stop token, ``all`` every token.

    Raises:
        DataError: there is no template, or it cannot be used for training (no stop token, an
            answer that does not follow its generation prompt).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        loss_on: str = "completion",
    ) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self._tokenise = lru_cache(maxsize=65536)(self._tokenise_piece)
        specials = [
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        specials += [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        self._set_controls(specials)
        self.stop_id: int | None = None
        self.eos_id: int | None = tokenizer.eos_token_id
        if tokenizer.chat_template is not None:
            self._learn_template()
        plain = tokenizer("x").input_ids
        self.has_bos = self._has_single_bos(plain)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's stop token and the tokenizer's EOS."""
        return sorted({i for i in (self.stop_id, self.eos_id) if i is not None})

    @property
    def pad_id(self) -> int:
        """Id to pad with; padding is told apart by position, so that it may be the stop id."""
        return int(self.tokenizer.pad_token_id)

    @property
    def template_sha256(self) -> str:
        """Identity of the chat template, for the manifest."""
        return hashlib.sha256((self.tokenizer.chat_template or "").encode()).hexdigest()

    def encode_row(self, row: Row) -> Encoded:
        """Ids and labels of a row; nothing is truncated.

        After the last labelled token nothing is kept: later tokens have no label and, in a causal
        model, no influence. The label of position 0 is always -100, since nothing predicts it.

        Raises:
            DataError: the row cannot be rendered so that it teaches what it says.
        """
        if row.text is not None:
            return self._encode_text(row)
        self._need_template(row.place)
        messages, table = self._neutralise(row.messages, row.place)
        text = self._render(messages, row.place)
        answers = self._answers(messages, text, row.place)
        ids: list[int] = []
        labels: list[int] = []
        for new, supervised in self._parts(text[: answers[-1][1]], answers, table):
            ids += new
            labels += new if supervised or self.loss_on == "all" else [IGNORED] * len(new)
        labels[0] = IGNORED
        self._check(ids, labels, row.place)
        changed = any(m.content not in text for m in messages)
        escaped = any(written in self._controls for written in table.values())
        return Encoded(row.place, ids, labels, changed=changed, escaped=escaped)

    def encode_prompt(self, messages: tuple[Message, ...], place: str = "prompt") -> list[int]:
        """Ids up to where the assistant's answer begins: the ids that precede it in training."""
        self._need_template(place)
        neutral, table = self._neutralise(messages, place)
        text = self._render(neutral, place, prompt=True)
        answers = self._answers(neutral, text, place)
        return [index for new, _ in self._parts(text, answers, table) for index in new]

    def _parts(
        self, text: str, answers: list[tuple[int, int]], table: dict[str, str]
    ) -> Iterator[tuple[list[int], bool]]:
        """Ids of each stretch of ``text`` and whether it is an answer; cut the same way everywhere."""
        at = 0
        for start, end in answers:
            yield self._encode(text[at:start], table, first=at == 0), False
            yield self._encode(text[start:end], table, first=False), True
            at = end
        yield self._encode(text[at:], table, first=at == 0), False

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, control tokens left out."""
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text).strip()

    # --- the template ---

    def _need_template(self, place: str) -> None:
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"{place}: a conversation, but the model brings no chat template. Set"
                f" data.chat_template to {', '.join(TEMPLATE_NAMES)} or a .jinja file"
            )

    def _learn_template(self) -> None:
        """Find the stop token, count template-only control tokens in, and prove the splicing."""
        text = self._render(PROBE, "chat template")
        used = {
            token
            for index, token in self.tokenizer.added_tokens_decoder.items()
            # Gemma lists runs of newlines among its added tokens; they are text all the same.
            if str(token).strip() and str(token) in text and index in self._plain_ids(text)
        }
        self._set_controls([*self._controls, *(str(token) for token in used)])
        after = text[text.index("epsilon zeta") + len("epsilon zeta") :]
        stop = self._pattern.match(after.lstrip())
        if stop is None:
            raise DataError(
                f"chat template: an assistant turn ends with {after!r}, which holds no control token"
                " of this tokenizer, so the model could not learn to stop. Name another"
                f" data.chat_template ({', '.join(TEMPLATE_NAMES)}) or add {{{{ eos_token }}}}"
            )
        self._stop = stop.group()
        self.stop_id = self.tokenizer.convert_tokens_to_ids(self._stop)
        self._answers(PROBE, text, "chat template")
        if self._encode(text, {}, first=True)[-8:] != self._plain_ids(text)[-8:]:
            raise DataError(
                "chat template: this tokenizer splits text differently beside control tokens, so rows"
                " cannot be put together from parts; it is not supported"
            )

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _render(self, messages: tuple[Message, ...], place: str, *, prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # Jinja and the template's own raise_exception
            raise DataError(f"{place}: the chat template refuses it: {error}") from error
        return str(text)

    def _answers(
        self, messages: tuple[Message, ...], text: str, place: str
    ) -> list[tuple[int, int]]:
        """Half-open character spans of the answers in ``text``, each with its stop token."""
        spans = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render(messages[:number], place, prompt=True)
            if not text.startswith(prompt):
                raise DataError(
                    f"{place}: the chat template renders the conversation differently from the prompt"
                    f" for its answer {number}: {text[: len(prompt)][-60:]!r} against {prompt[-60:]!r}."
                    " Training and generation would see different text"
                )
            stop = text.find(self._stop, len(prompt))
            if stop < 0:
                raise DataError(
                    f"{place}: the chat template writes no {self._stop} after answer {number}"
                )
            spans.append((len(prompt), stop + len(self._stop)))
        return spans

    # --- control tokens ---

    def _set_controls(self, controls: list[str]) -> None:
        self._controls = frozenset(controls)
        longest_first = sorted(self._controls, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._starts = {token[:size] for token in controls for size in range(1, len(token))}
        self._ends = {token[size:] for token in controls for size in range(1, len(token))}

    def _neutralise(
        self, messages: tuple[Message, ...], place: str
    ) -> tuple[tuple[Message, ...], dict[str, str]]:
        """Messages with a sentinel for each control string, and what each sentinel stands for.

        The ends of a message are guarded too, where they could complete a control string together
        with what the template writes next to them.
        """
        table: dict[str, str] = {}

        def sentinel(text: str) -> str:
            for char, known in table.items():
                if known == text:
                    return char
            char = chr(SENTINEL_START + len(table))
            table[char] = text
            return char

        neutral = []
        for message in messages:
            content = message.content
            if SENTINELS.search(content):
                raise DataError(
                    f"{place}: a {message.role} message holds a private-use character"
                    " (U+F0000 to U+FFFFD), which halfbyte reserves; remove it"
                )
            content = self._pattern.sub(lambda found: sentinel(found.group()), content)
            size = len(content.rstrip())
            tail = next((n for n in range(size) if content[n:size] in self._starts), size)
            if tail < size:
                content = content[:tail] + sentinel(content[tail:size]) + content[size:]
            lead = len(content) - len(content.lstrip())
            head = next(
                (n for n in range(len(content), lead, -1) if content[lead:n] in self._ends), lead
            )
            if head > lead:
                content = content[:lead] + sentinel(content[lead:head]) + content[head:]
            neutral.append(Message(message.role, content))
        return tuple(neutral), table

    # --- text to ids ---

    def _encode(self, text: str, table: dict[str, str], *, first: bool) -> list[int]:
        """Ids of template text: control tokens as themselves, everything else as plain text.

        ``first`` marks the beginning of a row, where BOS belongs if the tokenizer adds one.
        """
        ids: list[int] = []
        if first and self._adds_bos() and not text.startswith(str(self.tokenizer.bos_token)):
            text = str(self.tokenizer.bos_token) + text
        at = 0
        anchor = None if first else self._stop
        for found in self._pattern.finditer(text):
            ids += self._encode_plain(text[at : found.start()], table, anchor)
            ids.append(self.tokenizer.convert_tokens_to_ids(found.group()))
            anchor = found.group()
            at = found.end()
        return ids + self._encode_plain(text[at:], table, anchor)

    def _encode_plain(self, text: str, table: dict[str, str], anchor: str | None) -> list[int]:
        """Ids of text without control tokens; ``anchor`` is the control token before it."""
        if not text:
            return []
        if table:
            text = SENTINELS.sub(lambda found: table[found.group()], text)
        ids: list[int] = []
        at = 0
        # Cut each control string behind its first character: no part of it is one any more.
        for found in self._pattern.finditer(text):
            ids += self._tokenise(anchor, text[at : found.start() + 1])
            at = found.start() + 1
        return ids + list(self._tokenise(anchor, text[at:]))

    def _tokenise_piece(self, anchor: str | None, text: str) -> tuple[int, ...]:
        # Behind an anchor, tokenizers that mark the beginning of a text do not mark this one.
        ids = self._plain_ids((anchor or "") + text)
        return tuple(ids[1:] if anchor else ids)

    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("x").input_ids[:1] == [bos]

    def _has_single_bos(self, plain: list[int]) -> bool:
        bos = self.tokenizer.bos_token_id
        if bos is None or self.tokenizer.chat_template is None:
            return bos is not None and plain[:1] == [bos]
        ids = self._encode(self._render(PROBE, "chat template"), {}, first=True)
        return ids[0] == bos and (self._adds_bos() or ids.count(bos) == 1)

    def _encode_text(self, row: Row) -> Encoded:
        assert row.text is not None
        found = self._pattern.search(row.text)
        if found:
            raise DataError(
                f"{row.place}: raw text holds the control token {found.group()!r}, as if it were"
                " already rendered. Use the format messages and let the chat template write it"
            )
        bos = [self.tokenizer.bos_token_id] if self._adds_bos() else []
        eos = [self.eos_id] if self.eos_id is not None else []
        ids = bos + list(self._tokenise(None, row.text)) + eos
        labels = [IGNORED, *ids[1:]]
        self._check(ids, labels, row.place)
        return Encoded(row.place, ids, labels)

    def _check(self, ids: list[int], labels: list[int], place: str) -> None:
        if self.has_bos and (ids[0] != self.tokenizer.bos_token_id or ids.count(ids[0]) != 1):
            raise DataError(
                f"{place}: {ids.count(self.tokenizer.bos_token_id)} BOS tokens; exactly one is right,"
                " at the start"
            )
        if all(label == IGNORED for label in labels):
            raise DataError(f"{place}: no token carries a label: there is nothing to learn")
