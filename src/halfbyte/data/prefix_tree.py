"""Owns how the rows of an optimizer step are packed into passes: no padding, each shared prefix once.

Rows of one domain begin alike: template, system prompt, instruction. In a causal model equal prefixes
have equal hidden states, so a prefix that is computed once serves every row that begins with it. The
rows of a forward pass form a prefix tree, whose nodes are laid out one after another, each before its
descendants. A token attends to the tokens of its node up to itself and to all tokens of the node's
ancestors. A row's tokens from its last label on are not read, because nothing there predicts anything.
The loss of a step is a sum over labelled tokens, so rows may be grouped into passes in any way.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from halfbyte.data.encoded import IGNORED

# Tokens that a separate node must save, since it costs every layer another attention call.
MIN_SAVED_TOKENS = 8

Tokens = tuple[list[int], list[int]]  # ids and labels of a row, equally many


@dataclass(frozen=True)
class Node:
    """A run of tokens that the same rows share.

    Attributes:
        start: index of its first token in the pass.
        end: index after its last token.
        subtree_end: index after the last token of its last descendant.
        position: position of its first token in every row that runs through it.
        parent: number of its parent node, -1 for a root.
    """

    start: int
    end: int
    subtree_end: int
    position: int
    parent: int

    @property
    def length(self) -> int:
        """Number of tokens in the node."""
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """The tokens of one forward pass over some rows, and what is predicted from them.

    Attributes:
        rows: ids and labels of each row, in the caller's order.
        ids: ids of the pass's T tokens.
        positions: position of each token in the rows that contain it.
        nodes: the prefix tree, each node before its descendants.
        paths: for each row, the indices in the pass of the row's tokens that are read.
        sources: for each of N predictions, the index of the token that makes it.
        targets: for each prediction, the id of the token to be predicted.
        counts: for each prediction, the number of rows in which its target is labelled, or the sum of
            their weights.
        predictions: for each row, the numbers of its predictions, in reading order.
        weights: factor of each row's loss.
        groups: number of the group that each row is counted in, () where there is one.
        padded: whether to compute the rows as a plain padded batch instead.
    """

    rows: Sequence[Tokens]
    ids: list[int]
    positions: list[int]
    nodes: tuple[Node, ...]
    paths: list[list[int]]
    sources: list[int]
    targets: list[int]
    counts: Sequence[float]
    predictions: list[list[int]]
    weights: Sequence[float]
    groups: Sequence[int] = ()
    padded: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the rows; shared ones count once for each row."""
        return sum(len(ids) for ids, _ in self.rows)

    def counts_of_groups(self, num_groups: int) -> list[list[float]]:
        """Return ``counts`` divided among the groups: for each, those of its rows."""
        counts: list[list[float]] = [[0] * len(self.targets) for _ in range(num_groups)]
        for group, weight, predictions in zip(
            self.groups, self.weights, self.predictions, strict=True
        ):
            for prediction in predictions:
                counts[group][prediction] += weight
        return counts


def ids_before_last_label(row: Tokens) -> list[int]:
    """Return the ids that must be read to make a row's predictions: those before its last label."""
    ids, labels = row
    last = next((i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED), 1)
    return ids[:last]


def lay_out(
    rows: Sequence[Tokens],
    *,
    share: bool,
    padded: bool = False,
    weights: Sequence[float] | None = None,
    groups: Sequence[int] = (),
) -> Layout:
    """Lay out the pass over ``rows``; ``share`` computes common prefixes once.

    ``weights`` are factors of the rows' losses, None for 1; ``groups`` are as in ``Layout``.
    """
    inputs = [ids_before_last_label(row) for row in rows]
    order = sorted(range(len(rows)), key=inputs.__getitem__) if share else range(len(rows))
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int, int]] = []  # start, end, position, parent
    paths: list[list[int]] = [[] for _ in rows]

    def add_node(members: Sequence[int], begin: int, end: int, parent: int) -> int:
        """Append tokens ``begin`` to ``end`` of these rows as a node; return the node's number."""
        if begin == end:
            return parent
        start = len(ids)
        ids.extend(inputs[members[0]][begin:end])
        positions.extend(range(begin, end))
        spans.append((start, len(ids), begin, parent))
        for row in members:
            paths[row].extend(range(start, len(ids)))
        return len(spans) - 1

    if share:
        common = _prefix_with_previous(inputs, order)
        pending = [(0, len(rows), 0, -1)]
        while pending:
            first, last, depth, parent = pending.pop()
            members = order[first:last]
            if len(members) == 1:
                add_node(members, depth, len(inputs[members[0]]), parent)
                continue
            shared = min(common[first + 1 : last])
            if _saved_tokens(len(members), shared - depth):
                parent, depth = add_node(members, depth, shared, parent), shared
            cuts = [first, *(i for i in range(first + 1, last) if common[i] == shared), last]
            pending += [(a, b, depth, parent) for a, b in reversed([*itertools.pairwise(cuts)])]
    else:
        for row in order:
            add_node([row], 0, len(inputs[row]), -1)
    factors: Sequence[float] = weights or [1] * len(rows)
    return _with_predictions(rows, factors, groups, ids, positions, _nodes(spans), paths, padded)


def shared_prefix_nodes(lengths: Sequence[int], shared: int) -> tuple[Node, ...]:
    """Return the tree of rows that begin with the same ``shared`` tokens and end with a label."""
    lengths = [max(1, length - 1) for length in lengths]  # the last token is not read
    pays = _saved_tokens(len(lengths), shared)
    spans = [(0, shared, 0, -1)] if pays else []
    start, depth = (shared, shared) if pays else (0, 0)
    for length in lengths:
        if length > depth:
            spans.append((start, start + length - depth, depth, 0 if pays else -1))
            start += length - depth
    return _nodes(spans)


def _nodes(spans: list[tuple[int, int, int, int]]) -> tuple[Node, ...]:
    """Turn spans of start, end, position and parent into nodes that know where their subtrees end."""
    subtree_ends = [end for _, end, _, _ in spans]
    for number in range(len(spans) - 1, -1, -1):
        parent = spans[number][3]
        if parent >= 0:
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[number])
    return tuple(
        Node(start, end, subtree_end, position, parent)
        for (start, end, position, parent), subtree_end in zip(spans, subtree_ends, strict=True)
    )


def _with_predictions(
    rows: Sequence[Tokens],
    weights: Sequence[float],
    groups: Sequence[int],
    ids: list[int],
    positions: list[int],
    nodes: tuple[Node, ...],
    paths: list[list[int]],
    padded: bool,
) -> Layout:
    """Build the layout, with one prediction for each distinct pair of source and label."""
    numbers: dict[tuple[int, int], int] = {}
    counts: list[float] = []
    predictions: list[list[int]] = []
    for (_, labels), path, weight in zip(rows, paths, weights, strict=True):
        row_predictions = []
        for i in range(1, len(labels)):
            if labels[i] == IGNORED:
                continue
            # Rows that share everything up to here and have the same label share one prediction.
            number = numbers.setdefault((path[i - 1], labels[i]), len(numbers))
            if number == len(counts):
                counts.append(0)
            counts[number] += weight
            row_predictions.append(number)
        predictions.append(row_predictions)
    sources, targets = [source for source, _ in numbers], [target for _, target in numbers]
    return Layout(
        rows,
        ids,
        positions,
        nodes,
        paths,
        sources,
        targets,
        counts,
        predictions,
        weights,
        groups,
        padded,
    )


def _input_ids(rows: Sequence[Tokens], padded: bool) -> Iterator[list[int]]:
    """Yield the ids that a pass reads of each row; a padded pass reads whole rows."""
    return (row[0] if padded else ids_before_last_label(row) for row in rows)


def _prefix_with_previous(inputs: list[list[int]], order: Sequence[int]) -> list[int]:
    """Return, for each row in this order, the length of its common prefix with the row before it."""
    return [0, *(_common_length(inputs[a], inputs[b]) for a, b in itertools.pairwise(order))]


def _common_length(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    for i, (x, y) in enumerate(zip(a, b)):  # noqa: B905  as far as the shorter one goes
        if x != y:
            return i
    return min(len(a), len(b))


def _saved_tokens(num_rows: int, shared: int) -> int:
    """Return how many tokens ``num_rows`` rows save by sharing ``shared``; 0 if it does not pay."""
    saved = (num_rows - 1) * shared
    return saved if saved >= MIN_SAVED_TOKENS else 0


def common_prefix(rows: Iterable[list[int]]) -> int:
    """Return the number of tokens that all rows begin with."""
    prefix: list[int] | None = None
    for row in rows:
        prefix = row if prefix is None else prefix[: _common_length(prefix, row)]
        if not prefix:
            break
    return len(prefix or ())


def pass_tokens(rows: Sequence[Tokens], num_rows: int, *, share: bool, padded: bool = False) -> int:
    """Return the most tokens that a pass over any ``num_rows`` of these rows can have."""
    longest = heapq.nlargest(num_rows, map(len, _input_ids(rows, padded)))
    if padded:
        return longest[0] * len(longest)
    shared = common_prefix(_input_ids(rows, padded)) if share else 0
    return sum(longest) - _saved_tokens(len(longest), shared)


def cut_step(
    rows: Sequence[Tokens], max_tokens: int, *, share: bool, padded: bool = False
) -> list[list[int]]:
    """Cut a step into as few passes of at most ``max_tokens`` as possible, of about equal size.

    A row longer than ``max_tokens`` gets a pass to itself.

    Returns:
        The row numbers of each pass.
    """
    inputs = list(_input_ids(rows, padded))
    order = list(range(len(rows)))
    if padded or share:
        order.sort(key=lambda row: len(inputs[row]) if padded else inputs[row])
    lengths = [len(inputs[row]) for row in order]
    common = _prefix_with_previous(inputs, order) if share and not padded else [0] * len(order)

    def num_tokens(num_rows: int, total: int, shared: int, last: int) -> int:
        if padded:  # the rows are sorted: the last one is the longest
            return num_rows * last
        return total - _saved_tokens(num_rows, shared)

    def fill_passes(limit: int) -> list[list[int]]:
        passes: list[list[int]] = []
        total = shared = 0
        for row, length, prefix in zip(order, lengths, common, strict=True):
            extended = total + length, min(shared, prefix)
            if passes and num_tokens(len(passes[-1]) + 1, *extended, length) <= limit:
                passes[-1].append(row)
                total, shared = extended
            else:
                passes.append([row])
                total = shared = length
        return passes

    num_passes = len(fill_passes(max_tokens))
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(fill_passes(middle)) <= num_passes:
            high = middle
        else:
            low = middle + 1
    return fill_passes(high)
