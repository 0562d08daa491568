"""Owns rendering: conversations to ids and labels, the same way in training, evaluation and serving.

The text comes from the tokenizer's chat template. It is cut where an answer begins, so that the
ids before an answer are exactly the ids of the generation prompt, and each part is tokenised on
its own. Control tokens count only where the template wrote them: the same characters in a message
are tokenised as plain text (issue 2; transformers issue 29279).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.paths import TEMPLATE_NAMES
from halfbyte.config.schema import Data
from halfbyte.data.rows import Message, Row
from halfbyte.data.special_tokens import Controls
from halfbyte.data.template_cache import Shapes
from halfbyte.data.tokenise import Pieces, plain_ids
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
BATCH_ROWS = 1 << 16  # rows whose texts are tokenised together, each text once
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
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class _Draft:
    """A row cut into numbered pieces: stretches of them, and whether each is learnt."""

    place: str
    parts: list[tuple[list[int], bool]]
    changed: bool = False
    escaped: bool = False


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
        specials = [
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        specials += [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        self._controls = Controls(specials, tokenizer)
        self.stop_id: int | None = None
        self.eos_id: int | None = tokenizer.eos_token_id
        plain = tokenizer("x").input_ids
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and plain[:1] == [bos]
        if tokenizer.chat_template is not None:
            self._learn_template()
        self._shapes = Shapes(
            tokenizer.chat_template, lambda messages: list(self._texts(messages, "chat template"))
        )
        self.has_bos = self._has_single_bos()

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
        return self.encode_rows([row])[0]

    def encode_rows(self, rows: list[Row]) -> list[Encoded]:
        """``encode_row`` of each row, many times faster: pieces of text are tokenised in batches.

        Raises:
            DataError: as ``encode_row``, of the first row that cannot be rendered.
        """
        encoded = []
        for found in self.try_rows(rows):
            if isinstance(found, DataError):
                raise found
            encoded.append(found)
        return encoded

    def try_rows(self, rows: list[Row]) -> Iterator[Encoded | DataError]:
        """``encode_row`` of each row in turn, or the error that it raises."""
        for at in range(0, len(rows), BATCH_ROWS):
            drafts, pieces = self._draft(rows[at : at + BATCH_ROWS])
            yield from self._finish(drafts, pieces.ids(self.tokenizer))

    def encode_prompt(self, messages: tuple[Message, ...], place: str = "prompt") -> list[int]:
        """Ids up to where the assistant's answer begins: the ids that precede it in training."""
        self._need_template(place)
        neutral, table = self._controls.neutralise(messages, place)
        text = self._render(neutral, place, prompt=True)
        answers = self._answers(neutral, text, self._prompts(neutral, place), place)
        pieces = Pieces(self._controls)
        parts = self._parts(text, answers, table, pieces)
        ids = pieces.ids(self.tokenizer)
        return [index for numbers, _ in parts for number in numbers for index in ids[number]]

    def prompt_text(self, messages: tuple[Message, ...], place: str = "prompt") -> str:
        """What the chat template writes up to where the assistant's answer begins."""
        self._need_template(place)
        return self._render(messages, place, prompt=True)

    # --- rows to pieces, and pieces to ids and labels ---

    def _draft(self, rows: list[Row]) -> tuple[list[_Draft | DataError], Pieces]:
        pieces = Pieces(self._controls)
        drafts: list[_Draft | DataError] = []
        for row in rows:
            try:
                draft = self._draft_text if row.text is not None else self._draft_conversation
                drafts.append(draft(row, pieces))
            except DataError as error:
                drafts.append(error)
        return drafts, pieces

    def _draft_conversation(self, row: Row, pieces: Pieces) -> _Draft:
        self._need_template(row.place)
        messages, table = self._controls.neutralise(row.messages, row.place)
        texts = self._shapes.texts(messages) or self._texts(messages, row.place)
        text = next(texts)
        answers = self._answers(messages, text, texts, row.place)
        parts = self._parts(text[: answers[-1][1]], answers, table, pieces)
        changed = any(m.content not in text for m in messages)
        escaped = bool(table) and any(s in self._controls.strings for s in table.values())
        return _Draft(row.place, parts, changed=changed, escaped=escaped)

    def _draft_text(self, row: Row, pieces: Pieces) -> _Draft:
        assert row.text is not None
        found = self._controls.pattern.search(row.text)
        if found:
            raise DataError(
                f"{row.place}: raw text holds the control token {found.group()!r}, as if it were"
                " already rendered. Use the format messages and let the chat template write it"
            )
        bos = [pieces.control(self.tokenizer.bos_token)] if self._adds_bos else []
        eos = [pieces.control(self.tokenizer.eos_token)] if self.eos_id is not None else []
        return _Draft(row.place, [([*bos, pieces.text(None, row.text), *eos], True)])

    def _parts(
        self,
        text: str,
        answers: list[tuple[int, int]],
        table: dict[str, str],
        pieces: Pieces,
    ) -> list[tuple[list[int], bool]]:
        """Pieces of each stretch of ``text`` and whether it is an answer; cut the same way everywhere."""
        parts = []
        at = 0
        for start, end in answers:
            parts.append((self._cut(text[at:start], table, pieces, first=at == 0), False))
            parts.append((self._cut(text[start:end], table, pieces, first=False), True))
            at = end
        parts.append((self._cut(text[at:], table, pieces, first=at == 0), False))
        return parts

    def _cut(self, text: str, table: dict[str, str], pieces: Pieces, *, first: bool) -> list[int]:
        """Numbers of the pieces of ``text``.

        ``first`` marks the beginning of a row, where BOS belongs if the tokenizer adds one.
        """
        if first and self._adds_bos and not text.startswith(str(self.tokenizer.bos_token)):
            text = str(self.tokenizer.bos_token) + text
        return pieces.cut(text, table, None if first else self._stop)

    def _finish(
        self, drafts: list[_Draft | DataError], piece_ids: list[list[int]]
    ) -> Iterator[Encoded | DataError]:
        for draft in drafts:
            if isinstance(draft, DataError):
                yield draft
                continue
            ids: list[int] = []
            labels: list[int] = []
            for numbers, supervised in draft.parts:
                new = list(chain.from_iterable([piece_ids[number] for number in numbers]))
                ids += new
                labels += new if supervised or self.loss_on == "all" else [IGNORED] * len(new)
            labels[:1] = [IGNORED]
            fault = self._fault(ids, labels, draft.place)
            yield fault or Encoded(
                draft.place, ids, labels, changed=draft.changed, escaped=draft.escaped
            )

    def _fault(self, ids: list[int], labels: list[int], place: str) -> DataError | None:
        if self.has_bos and (ids[0] != self.tokenizer.bos_token_id or ids.count(ids[0]) != 1):
            return DataError(
                f"{place}: {ids.count(self.tokenizer.bos_token_id)} BOS tokens; exactly one is right,"
                " at the start"
            )
        if labels.count(IGNORED) == len(labels):
            return DataError(f"{place}: no token carries a label: there is nothing to learn")
        return None

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
        strings = [*self._controls.strings, *(str(token) for token in used)]
        self._controls = Controls(strings, self.tokenizer)
        after = text[text.index("epsilon zeta") + len("epsilon zeta") :]
        stop = self._controls.pattern.match(after.lstrip())
        if stop is None:
            raise DataError(
                f"chat template: an assistant turn ends with {after!r}, which holds no control token"
                " of this tokenizer, so the model could not learn to stop. Name another"
                f" data.chat_template ({', '.join(TEMPLATE_NAMES)}) or add {{{{ eos_token }}}}"
            )
        self._stop = stop.group()
        self.stop_id = self.tokenizer.convert_tokens_to_ids(self._stop)
        self._answers(PROBE, text, self._prompts(PROBE, "chat template"), "chat template")
        if self._ids(text)[-8:] != self._plain_ids(text)[-8:]:
            raise DataError(
                "chat template: this tokenizer splits text differently beside control tokens, so rows"
                " cannot be put together from parts; it is not supported"
            )

    def _plain_ids(self, text: str) -> list[int]:
        return plain_ids(self.tokenizer, [text])[0]

    def _ids(self, text: str) -> list[int]:
        """Ids of a whole text that the template wrote."""
        pieces = Pieces(self._controls)
        numbers = self._cut(text, {}, pieces, first=True)
        ids = pieces.ids(self.tokenizer)
        return [index for number in numbers for index in ids[number]]

    def _has_single_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        if bos is None or self.tokenizer.chat_template is None:
            return self._adds_bos
        ids = self._ids(self._render(PROBE, "chat template"))
        return ids[0] == bos and (self._adds_bos or ids.count(bos) == 1)

    def _prompts(self, messages: tuple[Message, ...], place: str) -> Iterator[str]:
        """The text of the prompt of each answer, rendered as generation would."""
        for number, message in enumerate(messages):
            if message.role == "assistant":
                yield self._render(messages[:number], place, prompt=True)

    def _texts(self, messages: tuple[Message, ...], place: str) -> Iterator[str]:
        """The text of a conversation, then of the prompt of each of its answers."""
        yield self._render(messages, place)
        yield from self._prompts(messages, place)

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
        self, messages: tuple[Message, ...], text: str, prompts: Iterator[str], place: str
    ) -> list[tuple[int, int]]:
        """Half-open character spans of the answers in ``text``, each with its stop token."""
        spans = []
        numbers = (n for n, message in enumerate(messages) if message.role == "assistant")
        for number, prompt in zip(numbers, prompts, strict=True):
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
