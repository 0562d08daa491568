"""Owns how the rows of an optimizer step lie in its passes: no padding, each common prefix once.

Rows of one domain begin alike: template, system prompt, instruction. In a causal model equal beginnings
have equal states, so that a prefix computed once serves every row that begins with it. The rows of a
pass form a prefix tree; its nodes lie one behind the other, each before its descendants. A token attends
to its node up to itself and to the nodes above. From the last label on a row is not read: nothing there
predicts anything. The loss of a step is a sum over labelled tokens, so that rows may be put together in
any way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.data.render import IGNORED

# What a node of its own must save: it costs every layer another attention call.
MIN_SAVED_TOKENS = 8

Tokens = tuple[list[int], list[int]]  # ids and labels of a row, equally many


@dataclass(frozen=True)
class Node:
    """A run of tokens that the same rows share.

    Attributes:
        start: its first token's place in the pass.
        end: behind its last token.
        below: behind the last token of its last descendant.
        position: of its first token in every row that runs through it.
        parent: number of the node above, -1 for a root.
    """

    start: int
    end: int
    below: int
    position: int
    parent: int

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """One pass over some rows.

    Attributes:
        rows: ids and labels, in the order of the caller.
        ids: the T tokens of the pass.
        positions: of each in its rows.
        nodes: the tree, each before its descendants.
        paths: for each row the places of the tokens that are read of it.
        sources: for each of N predictions the place of the token that makes it.
        targets: the token that it is to predict.
        counts: in how many rows it is labelled.
        predictions: for each row the numbers of its predictions, in reading order.
        padded: compute as a plain padded batch of the rows instead.
    """

    rows: Sequence[Tokens]
    ids: list[int]
    positions: list[int]
    nodes: tuple[Node, ...]
    paths: list[list[int]]
    sources: list[int]
    targets: list[int]
    counts: list[int]
    predictions: list[list[int]]
    padded: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows, shared ones as often as they occur."""
        return sum(len(ids) for ids, _ in self.rows)


def read_part(row: Tokens) -> list[int]:
    """The ids that must be read for a row's predictions: those before its last label."""
    ids, labels = row
    last = next((i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED), 1)
    return ids[:last]


def lay_out(rows: Sequence[Tokens], *, share: bool, padded: bool = False) -> Layout:
    """The pass over ``rows``; ``share`` computes common prefixes once."""
    read = [read_part(row) for row in rows]
    order = sorted(range(len(rows)), key=read.__getitem__) if share else range(len(rows))
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int, int]] = []  # start, end, position, parent
    paths: list[list[int]] = [[] for _ in rows]

    def place(members: Sequence[int], begin: int, end: int, parent: int) -> int:
        """Lay down tokens begin … end of these rows; returns the node's number."""
        if begin == end:
            return parent
        start = len(ids)
        ids.extend(read[members[0]][begin:end])
        positions.extend(range(begin, end))
        spans.append((start, len(ids), begin, parent))
        for row in members:
            paths[row].extend(range(start, len(ids)))
        return len(spans) - 1

    if share:
        common = _shared_with_last(read, order)
        waiting = [(0, len(rows), 0, -1)]
        while waiting:
            first, last, depth, parent = waiting.pop()
            members = order[first:last]
            if len(members) == 1:
                place(members, depth, len(read[members[0]]), parent)
                continue
            shared = min(common[first + 1 : last])
            if _saved_tokens(len(members), shared - depth):
                parent, depth = place(members, depth, shared, parent), shared
            cuts = [first, *(i for i in range(first + 1, last) if common[i] == shared), last]
            waiting += [(a, b, depth, parent) for a, b in reversed([*itertools.pairwise(cuts)])]
    else:
        for row in order:
            place([row], 0, len(read[row]), -1)
    return _score(rows, ids, positions, _nodes(spans), paths, padded)


def one_stem(lengths: Sequence[int], shared: int) -> tuple[Node, ...]:
    """The tree of rows that begin with the same ``shared`` tokens and end with a label."""
    lengths = [max(1, length - 1) for length in lengths]  # which is not read
    pays = _saved_tokens(len(lengths), shared)
    spans = [(0, shared, 0, -1)] if pays else []
    start, depth = (shared, shared) if pays else (0, 0)
    for length in lengths:
        if length > depth:
            spans.append((start, start + length - depth, depth, 0 if pays else -1))
            start += length - depth
    return _nodes(spans)


def _nodes(spans: list[tuple[int, int, int, int]]) -> tuple[Node, ...]:
    below = [end for _, end, _, _ in spans]
    for number in range(len(spans) - 1, -1, -1):
        parent = spans[number][3]
        if parent >= 0:
            below[parent] = max(below[parent], below[number])
    return tuple(
        Node(start, end, last, position, parent)
        for (start, end, position, parent), last in zip(spans, below, strict=True)
    )


def _score(
    rows: Sequence[Tokens],
    ids: list[int],
    positions: list[int],
    nodes: tuple[Node, ...],
    paths: list[list[int]],
    padded: bool,
) -> Layout:
    known: dict[tuple[int, int], int] = {}
    counts: list[int] = []
    predictions: list[list[int]] = []
    for (_, labels), places in zip(rows, paths, strict=True):
        mine = []
        for i in range(1, len(labels)):
            if labels[i] == IGNORED:
                continue
            # What rows share up to here and go on with alike is one prediction, counted twice.
            number = known.setdefault((places[i - 1], labels[i]), len(known))
            if number == len(counts):
                counts.append(0)
            counts[number] += 1
            mine.append(number)
        predictions.append(mine)
    sources, targets = [source for source, _ in known], [target for _, target in known]
    return Layout(rows, ids, positions, nodes, paths, sources, targets, counts, predictions, padded)


def _read(rows: Sequence[Tokens], padded: bool) -> list[list[int]]:
    """The ids that a pass reads of each row: padded ones whole."""
    return [row[0] if padded else read_part(row) for row in rows]


def _shared_with_last(read: list[list[int]], order: Sequence[int]) -> list[int]:
    """For each row in this order, with how many tokens it begins like the one before."""
    return [0, *(_common(read[a], read[b]) for a, b in itertools.pairwise(order))]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):  # noqa: B905  as far as the shorter one goes
        if x != y:
            return i
    return min(len(a), len(b))


def _saved_tokens(num_rows: int, shared: int) -> int:
    """What so many rows save by sharing so many tokens; nothing if it does not pay."""
    saved = (num_rows - 1) * shared
    return saved if saved >= MIN_SAVED_TOKENS else 0


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Tokens that all rows begin with."""
    return _common(min(rows), max(rows)) if rows else 0


def pass_tokens(rows: Sequence[Tokens], num_rows: int, *, share: bool, padded: bool = False) -> int:
    """The most tokens that a pass over any ``num_rows`` of these rows can have."""
    read = _read(rows, padded)
    longest = sorted(map(len, read), reverse=True)[:num_rows]
    if padded:
        return longest[0] * len(longest)
    shared = common_prefix(read) if share else 0
    return sum(longest) - _saved_tokens(len(longest), shared)


def cut_step(
    rows: Sequence[Tokens], max_tokens: int, *, share: bool, padded: bool = False
) -> list[list[int]]:
    """Row numbers of each pass: as few passes as ``max_tokens`` in each allow, of about equal size.

    A row longer than ``max_tokens`` has a pass of its own.
    """
    read = _read(rows, padded)
    order = list(range(len(rows)))
    if padded or share:
        order.sort(key=lambda row: len(read[row]) if padded else read[row])
    lengths = [len(read[row]) for row in order]
    common = _shared_with_last(read, order) if share and not padded else [0] * len(order)

    def tokens(num_rows: int, total: int, shared: int, last: int) -> int:
        if padded:  # sorted: the last row is the longest
            return num_rows * last
        return total - _saved_tokens(num_rows, shared)

    def passes(limit: int) -> list[list[int]]:
        cut: list[list[int]] = []
        total = shared = 0
        for row, length, same in zip(order, lengths, common, strict=True):
            both = total + length, min(shared, same)
            if cut and tokens(len(cut[-1]) + 1, *both, length) <= limit:
                cut[-1].append(row)
                total, shared = both
            else:
                cut.append([row])
                total = shared = length
        return cut

    best = passes(max_tokens)
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(passes(middle)) <= len(best):
            high = middle
        else:
            low = middle + 1
    return passes(high)
