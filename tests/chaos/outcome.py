"""What a case is, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chaos.scene import Scene


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        kind: the guarantee that it tries.
        name: what is done, in words.
        attempt: does it, and returns why the guarantee does not hold, or "".
    """

    kind: str
    name: str
    attempt: Callable[[], str]


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``why`` is "" if the guarantee held."""

    kind: str
    name: str
    why: str
    seconds: float


Campaign = Callable[[Scene, float], Iterator[Case]]


def evenly(count: int, wanted: int) -> list[int]:
    """Numbers from 1 to ``count``, evenly spread; at most ``wanted`` of them."""
    wanted = max(1, min(count, wanted))
    return sorted({1 + round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)})
