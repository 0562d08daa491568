"""Owns text to ids: pieces of text, each tokenised once, many at a time, on every core."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from halfbyte.data.special_tokens import SENTINELS, Controls
from halfbyte.libraries import parallel_tokenisers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer texts than this are not worth waking threads for.
MANY = 512
CALL_TEXTS = 1024  # what a call returns is many times larger than its ids


class Pieces:
    """Control tokens and stretches of text that rows are put together from, each known by a number.

    A stretch belongs to the control token before it, its anchor: behind one, tokenizers that mark
    the beginning of a text do not mark this one.
    """

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        # (anchor, text), or (control token, None).
        self._numbers: dict[tuple[str | None, str | None], int] = {}

    def control(self, token: str) -> int:
        """Number of a control token."""
        return self._numbers.setdefault((token, None), len(self._numbers))

    def text(self, anchor: str | None, text: str) -> int:
        """Number of text that holds no control token, behind the control token ``anchor``."""
        return self._numbers.setdefault((anchor, text), len(self._numbers))

    def cut(self, text: str, table: dict[str, str], anchor: str | None) -> list[int]:
        """Numbers of template text: control tokens as themselves, everything else as plain text.

        Args:
            text: what a template wrote of neutralised messages.
            table: what each sentinel in it stands for.
            anchor: the control token before the text, None at the beginning of a row.
        """
        numbers: list[int] = []
        parts = self._controls.split(text)
        for plain, token in zip(parts[::2], [*parts[1::2], None], strict=True):
            if plain:
                self._cut_plain(plain, table, anchor, numbers)
            if token is not None:
                numbers.append(self.control(token))
                anchor = token
        return numbers

    def _cut_plain(
        self, text: str, table: dict[str, str], anchor: str | None, numbers: list[int]
    ) -> None:
        at = 0
        if table and SENTINELS.search(text):
            text = SENTINELS.sub(lambda found: table[found.group()], text)
            # Cut each control string behind its first character: no part of it is one any more.
            for found in self._controls.pattern.finditer(text):
                numbers.append(self.text(anchor, text[at : found.start() + 1]))
                at = found.start() + 1
        numbers.append(self.text(anchor, text[at:]))

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of each piece, by its number."""
        texts = [(anchor or "") + text for anchor, text in self._numbers if text is not None]
        found = iter(plain_ids(tokenizer, texts))
        ids = []
        for anchor, text in self._numbers:
            if text is None:
                assert anchor is not None
                ids.append([self._controls.ids[anchor]])
            else:
                ids.append(next(found)[1:] if anchor else next(found))
        return ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, as ``tokenizer(text, add_special_tokens=False)`` gives them one by one."""
    # Leaves the Rust tokenizer without padding and truncation, which earlier calls may have set.
    tokenizer("x", add_special_tokens=False)
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    ids: list[list[int]] = []
    with parallel_tokenisers() if len(texts) >= MANY else nullcontext():
        for at in range(0, len(texts), CALL_TEXTS):
            found = encode(texts[at : at + CALL_TEXTS], add_special_tokens=False)
            ids += [encoding.ids for encoding in found]
    return ids
