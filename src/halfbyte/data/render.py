"""Owns rendering: conversations to ids and labels, the same way in training, evaluation and serving.

The text comes from the tokenizer's chat template. It is split where each answer begins, so that the
ids before an answer are exactly the ids of the generation prompt, and each part is tokenised by
itself. Special tokens count only where the template wrote them: the same characters in a message are
tokenised as plain text (issue 2; transformers issue 29279).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from halfbyte.config.schema import Data
from halfbyte.data.chat_template import (
    answer_spans,
    load_template,
    render,
    render_all,
    render_prompts,
    require_template,
    stop_token_after,
)
from halfbyte.data.rows import Message, Row
from halfbyte.data.special_tokens import SpecialTokens
from halfbyte.data.template_cache import TemplateCache
from halfbyte.data.tokenise import Segments, plain_ids
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
BATCH_ROWS = 1 << 16  # rows whose texts are tokenised together, each distinct text once
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
        place: where the row comes from, such as ``file:line``.
        ids: token ids.
        labels: label of each token.
        changed: whether the template altered a message (such as by trimming its ends).
        escaped: whether a message held special-token text, which is plain text now.
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
class _SegmentedRow:
    """A row split into numbered segments.

    Attributes:
        place: where the row comes from.
        parts: the segments' numbers in stretches, and whether each stretch is supervised.
        changed: as in ``Encoded``.
        escaped: as in ``Encoded``.
    """

    place: str
    parts: list[tuple[list[int], bool]]
    changed: bool = False
    escaped: bool = False


def renderer_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Return the renderer that a config's ``data`` section describes.

    Raises:
        DataError: as ``load_template`` and ``Renderer``.
    """
    template = load_template(data.chat_template) if data.chat_template else None
    return Renderer(tokenizer, template, data.loss_on)


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    Sets ``tokenizer.chat_template``, so that the template saved with the model is the one it was
    trained with.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text that replaces the tokenizer's template, or None to keep that.
        loss_on: ``completion`` labels assistant turns with their stop token, ``all`` every token.

    Raises:
        DataError: the template cannot be used for training (no stop token, an answer that does not
            follow its generation prompt).
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
        strings = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        strings += [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        self._special_tokens = SpecialTokens(strings, tokenizer)
        self.stop_id: int | None = None
        self.eos_id: int | None = tokenizer.eos_token_id
        ids = tokenizer("x").input_ids
        bos_id = tokenizer.bos_token_id
        self._adds_bos = bos_id is not None and ids[:1] == [bos_id]
        if tokenizer.chat_template is not None:
            self._inspect_template()
        self._template_cache = TemplateCache(
            tokenizer.chat_template,
            lambda messages: list(render_all(self.tokenizer, messages, "chat template")),
        )
        self.has_bos = self._has_single_bos()

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's stop token and the tokenizer's EOS token."""
        return sorted({i for i in (self.stop_id, self.eos_id) if i is not None})

    @property
    def pad_id(self) -> int:
        """Id to pad with; it may be the stop id, since padding is recognised by its position."""
        return int(self.tokenizer.pad_token_id)

    @property
    def template_sha256(self) -> str:
        """Sha256 of the chat template, which identifies it in the manifest."""
        return hashlib.sha256((self.tokenizer.chat_template or "").encode()).hexdigest()

    def encode_row(self, row: Row) -> Encoded:
        """Return the ids and labels of a row, without truncation to a maximum length.

        Nothing is kept after the last labelled token: later tokens have no label and, in a causal
        model, no influence. The label of position 0 is always -100, since nothing predicts it.

        Raises:
            DataError: the row cannot be rendered so that the model would learn its answers.
        """
        return self.encode_rows([row])[0]

    def encode_rows(self, rows: list[Row]) -> list[Encoded]:
        """Encode each row as ``encode_row`` does, many times faster: text is tokenised in batches.

        Raises:
            DataError: as ``encode_row``, for the first row that cannot be rendered.
        """
        encoded = []
        for result in self.try_rows(rows):
            if isinstance(result, DataError):
                raise result
            encoded.append(result)
        return encoded

    def try_rows(self, rows: list[Row]) -> Iterator[Encoded | DataError]:
        """Yield what ``encode_row`` gives for each row, or the error that it raises."""
        for start in range(0, len(rows), BATCH_ROWS):
            segmented, segments = self._segment_rows(rows[start : start + BATCH_ROWS])
            yield from self._assemble(segmented, segments.ids(self.tokenizer))

    def encode_prompt(self, messages: tuple[Message, ...], place: str = "prompt") -> list[int]:
        """Return the ids up to where the assistant's answer begins, as they precede it in training."""
        require_template(self.tokenizer, place)
        escaped, originals = self._special_tokens.escape(messages, place)
        text = render(self.tokenizer, escaped, place, generation_prompt=True)
        spans = answer_spans(
            escaped, text, render_prompts(self.tokenizer, escaped, place), self._stop_token, place
        )
        segments = Segments(self._special_tokens)
        parts = self._split_at_answers(text, spans, originals, segments)
        ids = segments.ids(self.tokenizer)
        return [index for numbers, _ in parts for number in numbers for index in ids[number]]

    def prompt_text(self, messages: tuple[Message, ...], place: str = "prompt") -> str:
        """Return what the chat template writes up to where the assistant's answer begins."""
        require_template(self.tokenizer, place)
        return render(self.tokenizer, messages, place, generation_prompt=True)

    # --- rows to segments, and segments to ids and labels ---

    def _segment_rows(self, rows: list[Row]) -> tuple[list[_SegmentedRow | DataError], Segments]:
        """Split each row into segments, or keep the error that it raises."""
        segments = Segments(self._special_tokens)
        segmented: list[_SegmentedRow | DataError] = []
        for row in rows:
            try:
                if row.text is not None:
                    segmented.append(self._segment_text(row, segments))
                else:
                    segmented.append(self._segment_conversation(row, segments))
            except DataError as error:
                segmented.append(error)
        return segmented, segments

    def _segment_conversation(self, row: Row, segments: Segments) -> _SegmentedRow:
        require_template(self.tokenizer, row.place)
        messages, originals = self._special_tokens.escape(row.messages, row.place)
        texts = self._template_cache.texts(messages) or render_all(
            self.tokenizer, messages, row.place
        )
        text = next(texts)
        spans = answer_spans(messages, text, texts, self._stop_token, row.place)
        parts = self._split_at_answers(text[: spans[-1][1]], spans, originals, segments)
        changed = any(message.content not in text for message in messages)
        escaped = any(original in self._special_tokens.strings for original in originals.values())
        return _SegmentedRow(row.place, parts, changed=changed, escaped=escaped)

    def _segment_text(self, row: Row, segments: Segments) -> _SegmentedRow:
        assert row.text is not None
        match = self._special_tokens.pattern.search(row.text)
        if match:
            raise DataError(
                f"{row.place}: raw text holds the special token {match.group()!r}, as if it were"
                " already rendered. Use the format messages and let the chat template write it"
            )
        bos_token, eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        bos = [segments.add_special_token(bos_token)] if self._adds_bos else []
        eos = [segments.add_special_token(eos_token)] if self.eos_id is not None else []
        return _SegmentedRow(row.place, [([*bos, segments.add_text(None, row.text), *eos], True)])

    def _split_at_answers(
        self,
        text: str,
        spans: list[tuple[int, int]],
        originals: dict[str, str],
        segments: Segments,
    ) -> list[tuple[list[int], bool]]:
        """Split ``text`` into stretches of segments, each with whether it is an answer.

        Training and generation split a text the same way.
        """
        parts = []
        at = 0
        for start, end in spans:
            before = self._split(text[at:start], originals, segments, first=at == 0)
            parts.append((before, False))
            parts.append((self._split(text[start:end], originals, segments, first=False), True))
            at = end
        parts.append((self._split(text[at:], originals, segments, first=at == 0), False))
        return parts

    def _split(
        self, text: str, originals: dict[str, str], segments: Segments, *, first: bool
    ) -> list[int]:
        """Return the numbers of the segments of ``text``.

        ``first`` marks the beginning of a row, where BOS belongs if the tokenizer adds one.
        """
        if first and self._adds_bos and not text.startswith(str(self.tokenizer.bos_token)):
            text = str(self.tokenizer.bos_token) + text
        return segments.split(text, originals, None if first else self._stop_token)

    def _assemble(
        self, rows: list[_SegmentedRow | DataError], segment_ids: list[list[int]]
    ) -> Iterator[Encoded | DataError]:
        """Yield ids and labels of each row, or its error."""
        for row in rows:
            if isinstance(row, DataError):
                yield row
                continue
            ids: list[int] = []
            labels: list[int] = []
            for numbers, supervised in row.parts:
                new = list(chain.from_iterable([segment_ids[number] for number in numbers]))
                ids += new
                labels += new if supervised or self.loss_on == "all" else [IGNORED] * len(new)
            labels[:1] = [IGNORED]
            error = self._check(ids, labels, row.place)
            yield error or Encoded(row.place, ids, labels, changed=row.changed, escaped=row.escaped)

    def _check(self, ids: list[int], labels: list[int], place: str) -> DataError | None:
        """Return what is wrong with the ids and labels of a row, if anything is."""
        if self.has_bos and (ids[0] != self.tokenizer.bos_token_id or ids.count(ids[0]) != 1):
            return DataError(
                f"{place}: has {ids.count(self.tokenizer.bos_token_id)} BOS tokens; it needs exactly"
                " one, at the start"
            )
        if labels.count(IGNORED) == len(labels):
            return DataError(f"{place}: no token has a label, so there is nothing to learn")
        return None

    def decode(self, ids: list[int]) -> str:
        """Return the text of generated ids without special tokens and without spaces at its ends."""
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text).strip()

    # --- the template ---

    def _inspect_template(self) -> None:
        """Find the stop token and the template's special tokens; check that parts can be joined."""
        text = render(self.tokenizer, PROBE, "chat template")
        written = {
            token
            for index, token in self.tokenizer.added_tokens_decoder.items()
            # Gemma lists runs of newlines among its added tokens; they are text all the same.
            if str(token).strip() and str(token) in text and index in self._plain_ids(text)
        }
        strings = [*self._special_tokens.strings, *(str(token) for token in written)]
        self._special_tokens = SpecialTokens(strings, self.tokenizer)
        self._stop_token = stop_token_after(text, PROBE[-1].content, self._special_tokens.pattern)
        self.stop_id = self.tokenizer.convert_tokens_to_ids(self._stop_token)
        prompts = render_prompts(self.tokenizer, PROBE, "chat template")
        answer_spans(PROBE, text, prompts, self._stop_token, "chat template")
        if self._template_ids(text)[-8:] != self._plain_ids(text)[-8:]:
            raise DataError(
                "chat template: this tokenizer splits text differently beside special tokens, so rows"
                " cannot be put together from parts; it is not supported"
            )

    def _plain_ids(self, text: str) -> list[int]:
        return plain_ids(self.tokenizer, [text])[0]

    def _template_ids(self, text: str) -> list[int]:
        """Return the ids of a whole text that the template wrote."""
        segments = Segments(self._special_tokens)
        numbers = self._split(text, {}, segments, first=True)
        ids = segments.ids(self.tokenizer)
        return [index for number in numbers for index in ids[number]]

    def _has_single_bos(self) -> bool:
        """Return whether a rendered row begins with BOS and has no other."""
        bos_id = self.tokenizer.bos_token_id
        if bos_id is None or self.tokenizer.chat_template is None:
            return self._adds_bos
        ids = self._template_ids(render(self.tokenizer, PROBE, "chat template"))
        return ids[0] == bos_id and (self._adds_bos or ids.count(bos_id) == 1)
