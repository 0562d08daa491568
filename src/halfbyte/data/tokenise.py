"""Owns tokenisation: segments of text to ids, each segment once, in batches, on every core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from halfbyte.data.conversation import Row
from halfbyte.data.special_tokens import SENTINELS, SpecialTokens
from halfbyte.libraries import parallel_tokenisers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With fewer texts than this, waking threads does not pay.
MIN_PARALLEL_TEXTS = 512
# Rows whose texts are tokenised together, each distinct text once, and about how many characters they have.
BATCH_ROWS = 1 << 16
BATCH_CHARS = 1 << 25
TEXTS_PER_CALL = 1024  # what a call returns is many times larger than its ids


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield the rows that are tokenised together."""
    batch: list[Row] = []
    num_chars = 0
    for row in rows:
        num_chars += len(row.text or "") + len(row.tools)
        num_chars += sum([len(message.content) for message in row.messages])
        if any(message.reasoning or message.tool_calls for message in row.messages):
            num_chars += sum([len(message.text) for message in row.messages])
        batch.append(row)
        if num_chars >= BATCH_CHARS or len(batch) == BATCH_ROWS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class Segments:
    """The distinct segments of some rows, each known by its number: special tokens and plain text.

    A segment of plain text belongs to the special token before it, its anchor: tokenizers that mark
    the beginning of a text do not mark one that follows a special token.

    Args:
        special_tokens: the tokens to split at.
        gap: as ``gap_of`` them.
    """

    def __init__(self, special_tokens: SpecialTokens, gap: str = "") -> None:
        self._special_tokens, self._gap = special_tokens, gap
        # (anchor, text), or (special token, None).
        self._numbers: dict[tuple[str | None, str | None], int] = {}

    def add_special_token(self, token: str) -> int:
        """Return the number of a special token."""
        return self._numbers.setdefault((token, None), len(self._numbers))

    def add_text(self, anchor: str | None, text: str) -> int:
        """Return the number of plain ``text`` behind the special token ``anchor``."""
        return self._numbers.setdefault((anchor, text), len(self._numbers))

    def within(self, anchor: str | None) -> str | None:
        """Return the anchor of a text that goes on behind other text."""
        if not self._gap or (anchor or "").endswith(self._gap):
            return anchor
        return (anchor or next(iter(self._special_tokens.ids))) + self._gap

    def split(self, text: str, originals: dict[str, str], anchor: str | None) -> list[int]:
        """Split template text into segments: its special tokens, and everything else as plain text.

        Args:
            text: what a template wrote of escaped messages.
            originals: the text that each sentinel in it stands for.
            anchor: the special token before the text, ``within`` it, or None at the beginning of a row.

        Returns:
            The numbers of the segments.
        """
        numbers: list[int] = []
        known = self._numbers
        parts = self._special_tokens.split(text)
        for plain, token in zip(parts[::2], [*parts[1::2], None], strict=True):
            if plain and originals:
                self._split_plain(plain, originals, anchor, numbers)
            elif plain:
                numbers.append(known.setdefault((anchor, plain), len(known)))
            if token is not None:
                numbers.append(known.setdefault((token, None), len(known)))
                anchor = token
        return numbers

    def _split_plain(
        self, text: str, originals: dict[str, str], anchor: str | None, numbers: list[int]
    ) -> None:
        """Append the numbers of plain text, with what its sentinels stand for put back."""
        start = 0
        if SENTINELS.search(text):
            text = SENTINELS.sub(lambda match: originals[match.group()], text)
            # Split special-token text after its first character: no segment holds a whole one then.
            for match in self._special_tokens.pattern.finditer(text):
                numbers.append(self.add_text(anchor, text[start : match.start() + 1]))
                start, anchor = match.start() + 1, self.within(anchor)
        numbers.append(self.add_text(anchor, text[start:]))

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the token ids of each segment, by its number."""
        texts = [(anchor or "") + text for anchor, text in self._numbers if text is not None]
        text_ids = iter(plain_ids(tokenizer, texts))
        within = self.within(None)
        num_gap_ids = len(plain_ids(tokenizer, [within])[0]) if within else 1
        ids = []
        for anchor, text in self._numbers:
            if text is None:
                assert anchor is not None
                ids.append([self._special_tokens.ids[anchor]])
            elif anchor:
                is_within = self._gap and anchor.endswith(self._gap)
                ids.append(next(text_ids)[num_gap_ids if is_within else 1 :])
            else:
                ids.append(next(text_ids))
        return ids


def gap_of(tokenizer: PreTrainedTokenizerBase, special: str) -> str:
    """Return what, behind a special token, lets a tokenizer read further text as within a text.

    It is "" but for tokenizers that mark the beginning of every text, also behind a special token (Llama-2's).
    """
    behind, gap, whole = plain_ids(tokenizer, [f"{special}a", f"{special}\n", f"{special}\na"])
    is_split = whole[: len(gap)] == gap
    return "\n" if is_split and whole[len(gap) :] != behind[1:] else ""


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids that ``tokenizer(text, add_special_tokens=False)`` gives each text by itself."""
    # Leaves the Rust tokenizer without padding and truncation, which earlier calls may have set.
    tokenizer("x", add_special_tokens=False)
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    ids: list[list[int]] = []
    with parallel_tokenisers() if len(texts) >= MIN_PARALLEL_TEXTS else nullcontext():
        for start in range(0, len(texts), TEXTS_PER_CALL):
            batch = encode(texts[start : start + TEXTS_PER_CALL], add_special_tokens=False)
            ids += [encoding.ids for encoding in batch]
    return ids
