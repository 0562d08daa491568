"""Owns rendering: conversations to ids and labels, the same way in training, evaluation and serving.

The text comes from the tokenizer's chat template. It is split where each answer begins, so that the
ids before an answer are exactly the ids of the generation prompt, and each part is tokenised by
itself. Special tokens count only where the template wrote them, or where an assistant writes markup of
its own, such as thoughts: the same characters in other messages are tokenised as plain text (issue 2;
transformers issue 29279).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

from halfbyte.config.dataset import Data
from halfbyte.data.answer_format import AnswerFormat
from halfbyte.data.answers import THINK_OPENER, Sample, context_spans, samples_of
from halfbyte.data.chat_format import PLACE, PROBE, ChatFormat, always_special
from halfbyte.data.chat_template import (
    ChatTemplate,
    load_template,
    own_template,
    require_template,
    template_sha256,
    with_date,
)
from halfbyte.data.completeness import Completeness
from halfbyte.data.conversation import Message, Row, system_in_question
from halfbyte.data.encoded import Encoded, SegmentedRow
from halfbyte.data.special_tokens import SpecialTokens
from halfbyte.data.splitting import Splitter
from halfbyte.data.template_cache import TemplateCache
from halfbyte.data.tokenise import Segments, batches
from halfbyte.data.turn_order import check_learnt
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def renderer_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Return the renderer that a config's ``data`` section describes.

    Raises:
        DataError: as ``load_template`` and ``Renderer``.
    """
    template = load_template(data.chat_template) if data.chat_template else None
    return Renderer(
        tokenizer,
        template,
        data.loss_on,
        stop=data.stop,
        system_as=data.system_as,
        day=data.date,
        vocabulary=data.new_tokens,
    )


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    Sets ``tokenizer.chat_template``, so that the template saved with the model is the one it was
    trained with.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text that replaces the tokenizer's template, or None to keep that.
        loss_on: ``completion`` labels assistant turns with their stop token, ``last`` the last of them
            alone, ``all`` every token.
        stop: ``eos`` ends answers with the EOS token, which the template does not do.
        system_as: ``user`` puts a system message into the first user turn.
        day: the day that a template is told for today; None for today.
        vocabulary: added tokens that are words of texts, whatever they look like.

    Raises:
        DataError: the template cannot be used for training (no stop token, an answer that does not
            follow its generation prompt).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        loss_on: str = "completion",
        *,
        stop: str = "template",
        system_as: str = "system",
        day: date | None = None,
        vocabulary: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.system_as = system_as
        self.template_names = (
            list(named) if isinstance(named := tokenizer.chat_template, dict) else []
        )
        template = own_template(tokenizer) if chat_template is None else chat_template
        if template is not None:
            tokenizer.chat_template = with_date(template, day or date.today())
        self.eos_id: int | None = tokenizer.eos_token_id
        self._template = ChatTemplate(tokenizer)
        self._completeness = Completeness(self._template)
        self._form: ChatFormat | None = None
        self._opener: str | None = None
        self._special_tokens = SpecialTokens(always_special(tokenizer), tokenizer)
        self._splitter = Splitter(tokenizer, self._special_tokens, None)
        if template is not None:
            self._form = ChatFormat(self._template, stop, vocabulary)
            self._special_tokens = self._form.special_tokens
            self._splitter = Splitter(tokenizer, self._special_tokens, self._form.stops[0])
            self._check_parts()
            prompt = self._template.prompt(PROBE[:1], PLACE)
            opening = THINK_OPENER.search(prompt)
            self._opener = opening.group(1) if opening else None
        self._template_cache = TemplateCache(
            tokenizer.chat_template, lambda messages: self._samples(messages, "", PLACE)
        )
        self._mark_ids = {self._special_tokens.ids[mark] for mark in self._special_tokens.marks}
        self.has_bos = self._has_single_bos()

    @property
    def stop_id(self) -> int | None:
        """Id of the token that ends an answer in the template; None without a template."""
        return self._special_tokens.ids[self._form.stops[0]] if self._form else None

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's stop tokens and the tokenizer's EOS token."""
        stops = self._form.stops if self._form else []
        ids = {self._special_tokens.ids[stop] for stop in stops}
        return sorted(ids | ({self.eos_id} if self.eos_id is not None else set()))

    @property
    def special_tokens(self) -> SpecialTokens:
        """The special tokens of the tokenizer and the template."""
        return self._special_tokens

    @property
    def pad_id(self) -> int:
        """Id to pad with; it may be the stop id, since padding is recognised by its position."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def template_sha256(self) -> str:
        """Sha256 of the chat template."""
        return template_sha256(self.tokenizer.chat_template)

    def encode_row(self, row: Row) -> Encoded:
        """Return the ids and labels of a row, without truncation to a maximum length.

        Nothing is kept after the last labelled token: later tokens have no label and, in a causal
        model, no influence. The label of position 0 is always -100, since nothing predicts it. Of a row
        that becomes several samples, this is the one that ends with the last answer.

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
            encoded.append(result[0])
        return encoded

    def try_rows(self, rows: Iterable[Row]) -> Iterator[list[Encoded] | DataError]:
        """Yield the samples of each row, that with the last answer first, or the error that it raises.

        Rows are taken as they are needed: of an iterator, no more than a batch is held.
        """
        for batch in batches(rows):
            segmented, segments = self._segment_rows(batch)
            yield from self._assemble(segmented, segments.ids(self.tokenizer))

    def encode_prompt(
        self,
        messages: tuple[Message, ...],
        place: str = "prompt",
        tools: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids up to where the assistant's answer begins, as they precede it in training.

        ``options`` are further variables for the chat template, such as ``enable_thinking``.
        """
        form = self._require_form(place).with_options(options or {})
        messages, tools, originals = self._special_tokens.escape(
            self._placed(messages), place, tools
        )
        text = form.template.prompt(messages, place, tools)
        spans = context_spans(form, text, messages, place, tools)
        return self._splitter.sample_ids(Sample(text, spans), originals)

    def prompt_text(
        self,
        messages: tuple[Message, ...],
        place: str = "prompt",
        tools: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return what the chat template writes up to where the assistant's answer begins."""
        form = self._require_form(place).with_options(options or {})
        return form.template.prompt(self._placed(messages), place, tools)

    @functools.cached_property
    def answer_format(self) -> AnswerFormat:
        """How the chat template writes thoughts and tool calls in an answer."""
        return AnswerFormat(self._form, self._opener)

    def reads(self, variable: str) -> bool:
        """Return whether the chat template reads this variable, so that an option of it has an effect."""
        return self._template.reads(variable)

    def wanted_text(self, row: Row) -> str:
        """Return what the model should generate of a row's last answer, as ``decode`` gives it."""
        if row.messages[-1].is_plain and not self._opener:
            return row.answer
        answer = replace(row.messages[-1], learnt=True)
        start = len(self.encode_prompt(row.messages[:-1], row.place, row.tools))
        ids = self.encode_row(replace(row, messages=(*row.messages[:-1], answer))).ids[start:]
        return self.decode(ids[:-1] if ids[-1:] == [self.stop_id] else ids)

    def turns(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        """Return messages as the chat template is given them, wherever it runs."""
        return self._template.turns(self._placed(messages))

    def _require_form(self, place: str) -> ChatFormat:
        require_template(self.tokenizer, place)
        assert self._form is not None
        return self._form

    def _placed(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the messages with the system message where the config wants it."""
        return messages if self.system_as == "system" else system_in_question(messages)

    # --- rows to segments, and segments to ids and labels ---

    def _segment_rows(
        self, rows: list[Row]
    ) -> tuple[list[list[SegmentedRow] | DataError], Segments]:
        """Split the samples of each row into segments, or keep the error that it raises."""
        segments = self._splitter.segments()
        segmented: list[list[SegmentedRow] | DataError] = []
        for row in rows:
            try:
                if row.text is not None:
                    text = self._splitter.raw_text(row, segments)
                    segmented.append([SegmentedRow(row.place, [(text, True)])])
                else:
                    segmented.append(self._segment_conversation(row, segments))
            except DataError as error:
                # Its traceback would keep the whole batch in memory.
                segmented.append(error.with_traceback(None))
        return segmented, segments

    def _segment_conversation(self, row: Row, segments: Segments) -> list[SegmentedRow]:
        self._require_form(row.place)
        messages = self._placed(row.messages)
        if self.loss_on == "last":
            earlier = [
                replace(message, learnt=message.role != "assistant") for message in messages[:-1]
            ]
            messages = (*earlier, messages[-1])
        check_learnt(messages, self.loss_on, row.place)
        messages, tools, originals = self._special_tokens.escape(messages, row.place, row.tools)
        sample = None
        is_plain = not tools and all(message.is_plain for message in messages)
        if is_plain and not (self._template.content_as_parts or self._opener):
            sample = self._template_cache.sample(messages)
        samples = [sample] if sample else self._samples(messages, tools, row.place)
        changed = self._completeness.check(messages, tools, samples, row.place)
        escaped = any(original in self._special_tokens.strings for original in originals.values())
        return [
            SegmentedRow(
                row.place,
                self._splitter.sample(sample, originals, segments),
                changed=changed,
                escaped=escaped,
            )
            for sample in samples
        ]

    def _samples(self, messages: tuple[Message, ...], tools: str, place: str) -> list[Sample]:
        """Return the texts in which the answers of escaped messages are learnt."""
        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        learnt = [number for number in answers if messages[number].learnt]
        return samples_of(self._require_form(place), messages, learnt, place, tools)

    def _assemble(
        self, rows: list[list[SegmentedRow] | DataError], segment_ids: list[list[int]]
    ) -> Iterator[list[Encoded] | DataError]:
        """Yield ids and labels of the samples of each row, or its error."""
        bos_id = self.tokenizer.bos_token_id if self.has_bos else None
        for row in rows:
            if isinstance(row, DataError):
                yield row
                continue
            samples: list[Encoded] = []
            error = None
            for number, sample in enumerate(row):
                labels_all = self.loss_on == "all" and not number
                encoded = sample.encode(segment_ids, labels_all=labels_all)
                error = error or encoded.fault(bos_id, self.stop_ids)
                samples.append(encoded)
            yield error or samples

    def decode(self, ids: list[int]) -> str:
        """Return the text of generated ids without marks of turns and without spaces at its ends.

        Markup of the answer, such as that of thoughts and of tool calls, is text.
        """
        return self.decode_markup(ids).strip()

    def decode_markup(self, ids: list[int]) -> str:
        """Return the text of ids as ``decode`` does, with all spaces."""
        ids = [token for token in ids if token not in self._mark_ids]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    # --- the template ---

    def _check_parts(self) -> None:
        """Check that the parts of a text can be tokenised by themselves.

        Raises:
            DataError: they cannot.
        """
        (sample, *_) = self._samples(PROBE, "", PLACE)
        if not self._splitter.joins(sample, self._template.render(PROBE, PLACE)):
            raise DataError(
                "chat template: this tokenizer splits text differently beside special tokens, so rows"
                " cannot be put together from parts; it is not supported"
            )

    def _has_single_bos(self) -> bool:
        """Return whether a rendered row begins with BOS and has no other."""
        bos_id = self.tokenizer.bos_token_id
        if bos_id is None or self._form is None:
            return self._splitter.adds_bos
        ids = self._splitter.ids(self._template.render(PROBE, PLACE))
        return ids[0] == bos_id and (self._splitter.adds_bos or ids.count(bos_id) == 1)
