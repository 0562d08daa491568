"""Owns the encoding of every part's rows, and what becomes of rows that are too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from halfbyte.config.dataset import Data
from halfbyte.data.conversation import Row
from halfbyte.data.drops import MAX_NAMED_ROWS, Drops
from halfbyte.data.encoded import Encoded
from halfbyte.data.fields import RowError
from halfbyte.data.prepared import Example
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError

TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no labelled token within max_length"


@dataclass
class EncodedParts:
    """The samples of each part.

    Attributes:
        examples: by the part's name.
        truncated: places of rows that were cut.
        full_lengths: tokens of each training sample before any is dropped or cut for its length.
        overlong: places and lengths of samples that are too long, if they are not cut.
    """

    examples: dict[str, list[Example]]
    truncated: list[str] = field(default_factory=list)
    full_lengths: list[int] = field(default_factory=list)
    overlong: list[tuple[str, int]] = field(default_factory=list)


def encode_parts(
    parts: dict[str, list[Row]], data: Data, renderer: Renderer, drops: Drops
) -> EncodedParts:
    """Encode the rows of every part and apply the policies for those that cannot be used.

    Args:
        parts: the rows of each part.
        data: the policies.
        renderer: encodes the rows.
        drops: counts the rows that are left out.

    Raises:
        DataError: rows cannot be rendered and ``on_malformed`` is ``error``, or are too long and
            ``on_overlength`` is ``error``.
    """
    encoded = EncodedParts({name: [] for name in parts})
    errors: list[RowError] = []
    # One list, so that texts are tokenised in as few batches as possible.
    all_rows = [(name, row) for name, rows in parts.items() for row in rows]
    results = renderer.try_rows([row for _, row in all_rows])
    for (name, row), samples in zip(all_rows, results, strict=True):
        if isinstance(samples, RowError):
            errors.append(samples)
        elif isinstance(samples, DataError):
            raise samples
        else:
            _add(encoded, name, row, samples, data, drops)
    drops.malformed(errors, data)
    if encoded.overlong and data.on_overlength == "error":
        raise _overlong_error(encoded.overlong, data)
    return encoded


def _add(
    encoded: EncodedParts,
    name: str,
    row: Row,
    samples: list[Encoded],
    data: Data,
    drops: Drops,
) -> None:
    """Add those samples of a row that fit, and count the row or the samples that do not."""
    faults: list[str] = []
    count: Callable[[str], None] = faults.append
    fitting = 0
    for sample in samples:
        if name == "train":
            encoded.full_lengths.append(len(sample.ids))
        fitted = _fit(sample, data, encoded, count)
        if fitted is not None:
            encoded.examples[name].append(Example(row, fitted))
            fitting += 1
    if faults and not fitting:
        drops.add(faults[0], row.place)
    else:
        drops.samples.update(faults)


def _fit(
    sample: Encoded, data: Data, encoded: EncodedParts, count: Callable[[str], None]
) -> Encoded | None:
    """Return a sample as it fits into ``max_length``, or None if it does not."""
    if len(sample.ids) <= data.max_length:
        return sample
    if data.on_overlength != "truncate":
        encoded.overlong.append((sample.place, len(sample.ids)))
        count(TOO_LONG)
        return None
    cut = replace(
        sample, ids=sample.ids[: data.max_length], labels=sample.labels[: data.max_length]
    )
    if cut.num_supervised:
        encoded.truncated.append(sample.place)
        return cut
    count(NOTHING_LEFT)
    return None


def _overlong_error(overlong: list[tuple[str, int]], data: Data) -> DataError:
    named = ", ".join(f"{place} ({size})" for place, size in overlong[:MAX_NAMED_ROWS])
    longest = max(size for _, size in overlong)
    return DataError(
        f"{len(overlong)} rows are longer than data.max_length {data.max_length}: {named}. Set"
        f" data.max_length={longest}, or data.on_overlength to drop or truncate"
    )
