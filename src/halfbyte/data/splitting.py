"""Owns the split of a text into segments: where answers begin and end, and at special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfbyte.data.answers import Sample
from halfbyte.data.conversation import Row
from halfbyte.data.fields import RowError
from halfbyte.data.special_tokens import SpecialTokens
from halfbyte.data.tokenise import Segments, gap_of, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parts = list[tuple[list[int], bool]]


class Splitter:
    """Splits texts, the same way in training and in generation.

    Args:
        tokenizer: says whether a row begins with BOS, and with which.
        special_tokens: the tokens to split at.
        anchor: a special token that may stand before a text that does not begin a row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens, anchor: str | None
    ) -> None:
        self.tokenizer, self.special_tokens, self.anchor = tokenizer, special_tokens, anchor
        bos_id = tokenizer.bos_token_id
        self._bos = str(tokenizer.bos_token)
        self._gap = "" if anchor is None else gap_of(tokenizer, anchor)
        self.adds_bos = bos_id is not None and tokenizer("x").input_ids[:1] == [bos_id]

    def segments(self) -> Segments:
        """Return new segments to split into."""
        return Segments(self.special_tokens, self._gap)

    def sample(self, sample: Sample, originals: dict[str, str], segments: Segments) -> Parts:
        """Split a text into stretches, each with whether it is learnt, up to the last that is.

        A text with nothing to learn is a generation prompt, and is split to its end.
        """
        text, at = sample.text, 0
        parts: Parts = []
        for span in sample.spans:
            parts.append((self.text(text, at, span.start, originals, segments), False))
            parts.append((self.text(text, span.start, span.end, originals, segments), span.learnt))
            at = span.end
        if not any(learnt for _, learnt in parts):
            parts.append((self.text(text, at, len(text), originals, segments), False))
            return parts
        while not parts[-1][1]:
            parts.pop()
        return parts

    def sample_ids(self, sample: Sample, originals: dict[str, str]) -> list[int]:
        """Return the ids of what ``sample`` gives."""
        segments = self.segments()
        parts = self.sample(sample, originals, segments)
        ids = segments.ids(self.tokenizer)
        return [index for numbers, _ in parts for number in numbers for index in ids[number]]

    def joins(self, sample: Sample, text: str) -> bool:
        """Return whether parts of a sample, tokenised by themselves, read as the whole, as ``text`` does too."""
        in_parts, whole = self.sample_ids(sample, {}), self.ids(sample.text)
        is_same: bool = self.tokenizer.decode(in_parts) == self.tokenizer.decode(whole)
        return is_same and self.ids(text)[-8:] == plain_ids(self.tokenizer, [text])[0][-8:]

    def text(
        self, text: str, start: int, end: int, originals: dict[str, str], segments: Segments
    ) -> list[int]:
        """Return the numbers of the segments of a part of a text, which may have sentinels.

        BOS belongs at the beginning of a text if the tokenizer adds one.
        """
        part = text[start:end]
        if start == 0 and self.adds_bos and not part.startswith(self._bos):
            part = self._bos + part
        anchor = self.anchor if start else None
        if start and self._gap and not self.special_tokens.ends(text[:start]):
            anchor = segments.within(anchor)
        return segments.split(part, originals, anchor)

    def raw_text(self, row: Row, segments: Segments) -> list[int]:
        """Return the numbers of the segments of a raw text with BOS and EOS.

        Raises:
            RowError: the text holds special tokens.
        """
        text = row.text or ""
        match = self.special_tokens.pattern.search(text)
        if match:
            raise RowError(
                row.place,
                "a special token in raw text",
                f"raw text holds the special token {match.group()!r}, as if it were already rendered."
                " Use the format messages and let the chat template write it",
            )
        bos_token, eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        bos = [segments.add_special_token(str(bos_token))] if self.adds_bos else []
        eos = [segments.add_special_token(str(eos_token))] if eos_token is not None else []
        return [*bos, segments.add_text(None, text), *eos]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a whole text that a template wrote."""
        segments = self.segments()
        numbers = self.text(text, 0, len(text), {}, segments)
        ids = segments.ids(self.tokenizer)
        return [index for number in numbers for index in ids[number]]
