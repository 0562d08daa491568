"""Owns when two prompts count as the same, and the number that a prompt is split by."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any


def normalised(prompt: str) -> str:
    """Return the prompt without regard to case, spaces and closing punctuation.

    Two prompts count as the same if their normalised forms are equal.
    """
    text = " ".join(prompt.casefold().split())
    end = len(text)
    while end and unicodedata.category(text[end - 1])[0] in "PZ":
        end -= 1
    return text[:end] or text or prompt


def digest_of(prompt: str) -> int:
    """Return 64 bits of the sha256 of the normalised prompt: prompts that count as the same have the same."""
    digest = hashlib.sha256(normalised(prompt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def fraction_of(digest: Any) -> Any:
    """Return digests, or arrays of them, as numbers in [0, 1)."""
    return digest / 2.0**64
