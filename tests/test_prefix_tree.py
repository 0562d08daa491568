"""Layouts of rows as prefix trees, and attention over them against plain masked attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.encoded import IGNORED
from halfbyte.data.prefix_tree import (
    MIN_SAVED_TOKENS,
    Node,
    Tokens,
    common_prefix,
    cut_step,
    lay_out,
)
from halfbyte.forward import prefix_attention
from halfbyte.forward.prefix_attention import gathered_attention, tree_attention
from halfbyte.forward.tree_parts import PrefixTree

PREFIXES: tuple[list[int], ...] = ([], [1] * 20, [1] * 20 + [2] * 9, [1] * 20 + [3] * 12, [4])


@st.composite
def row_sets(draw: st.DrawFn) -> list[Tokens]:
    """One to six rows; many begin alike, some are equal, some are the beginning of another."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        tail = draw(st.lists(st.integers(5, 9), max_size=24))
        ids = [*draw(st.sampled_from(PREFIXES)), *tail] or [7]
        labelled = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [i if on else IGNORED for i, on in zip(ids, labelled, strict=True)]
        rows.append((ids, [IGNORED, *labels[1:]]))
    return rows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(row_sets(), st.booleans())
def test_layout_spells_every_row_and_scores_every_label(rows: list[Tokens], share: bool) -> None:
    layout = lay_out(rows, share=share)
    assert layout.num_tokens == sum(len(ids) for ids, _ in rows)
    assert len(layout.ids) <= layout.num_tokens
    assert sum(layout.counts) == sum(label != IGNORED for _, labels in rows for label in labels)
    for (ids, labels), path, numbers in zip(rows, layout.paths, layout.predictions, strict=True):
        last = max([1, *(i for i in range(1, len(ids)) if labels[i] != IGNORED)])
        assert [layout.ids[i] for i in path] == ids[:last]
        assert [layout.positions[i] for i in path] == list(range(last))
        assert path == _above(layout.nodes, path[-1])
        wanted = [labels[i] for i in range(1, len(ids)) if labels[i] != IGNORED]
        assert [layout.targets[number] for number in numbers] == wanted
        before = [i - 1 for i in range(1, len(ids)) if labels[i] != IGNORED]
        assert [layout.positions[layout.sources[number]] for number in numbers] == before
    for number, node in enumerate(layout.nodes):
        assert node.length > 0
        assert node.parent < number
        inside = [n for n in layout.nodes if node.end <= n.start < node.subtree_end]
        assert all(_is_above(layout.nodes, number, layout.nodes.index(n)) for n in inside)


def _above(nodes: tuple[Node, ...], place: int) -> list[int]:
    """Places of the tokens up to ``place`` in its node and of the nodes above it."""
    number = next(n for n, node in enumerate(nodes) if node.start <= place < node.end)
    path: list[int] = []
    end = place + 1
    while number >= 0:
        path = [*range(nodes[number].start, end), *path]
        number = nodes[number].parent
        end = nodes[number].end
    return path


def _is_above(nodes: tuple[Node, ...], above: int, number: int) -> bool:
    while number > above:
        number = nodes[number].parent
    return number == above


def test_shared_prompt_is_laid_down_once() -> None:
    prompt = list(range(100, 160))
    rows = [([*prompt, i, i + 1], [IGNORED] * 60 + [i, i + 1]) for i in (1, 5, 9)]
    layout = lay_out(rows, share=True)
    assert len(layout.ids) == 63  # the last token of a row is only predicted
    assert layout.num_tokens == 186
    # The last prompt token predicts three different first tokens.
    assert layout.sources.count(59) == 3
    assert len(lay_out(rows, share=False).ids) == 183


def test_equal_rows_are_computed_once_and_counted_as_often_as_they_occur() -> None:
    row = (list(range(20)), [IGNORED, *range(1, 20)])
    layout = lay_out([row, row, row], share=True)
    assert len(layout.ids) == 19
    assert layout.counts == [3] * 19


def test_nested_prefixes_share_only_what_pays() -> None:
    stem, short, long = [1] * 40, [2] * (MIN_SAVED_TOKENS - 1), [3] * MIN_SAVED_TOKENS
    ids = [stem + short + [i] for i in (5, 6)] + [stem + long + [i] for i in (5, 6)]
    layout = lay_out([([*i, 9], [*i, 9]) for i in ids], share=True)
    assert len(layout.ids) == 40 + 2 * (len(short) + 1) + len(long) + 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(row_sets(), st.integers(1, 200), st.booleans(), st.booleans())
def test_cut_keeps_every_row_and_the_budget(
    rows: list[Tokens], max_tokens: int, share: bool, padded: bool
) -> None:
    passes = cut_step(rows, max_tokens, share=share, padded=padded)
    assert sorted(row for one in passes for row in one) == list(range(len(rows)))
    for one in passes:
        members = [rows[row] for row in one]
        tokens = len(lay_out(members, share=share).ids)
        if padded:
            tokens = len(one) * max(len(ids) for ids, _ in members)
        assert tokens <= max_tokens or len(one) == 1


def test_cut_makes_passes_of_about_equal_size() -> None:
    rows = [([i] * 11, [i] * 11) for i in range(10)]
    assert [len(one) for one in cut_step(rows, 90, share=True)] == [5, 5]


def test_common_prefix_of_rows() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert common_prefix([]) == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(row_sets(), st.booleans(), st.sampled_from([None, 4, 16]), st.sampled_from([(4, 2), (3, 3)]))
def test_tree_attention_equals_masked_attention_of_every_row(
    rows: list[Tokens], share: bool, window: int | None, heads: tuple[int, int]
) -> None:
    layout = lay_out(rows, share=share)
    size, tokens = 16, len(layout.ids)
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(n, tokens, size) for n in (heads[0], heads[1], heads[1]))
    weight = torch.randn(tokens, heads[0], size)
    tree = PrefixTree(layout.nodes, torch.device("cpu"))

    def outcome(attend: object, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        out = attend(*inputs)  # type: ignore[operator]
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(tokens, heads[0], size, dtype=q.dtype)
        k, v = (t.repeat_interleave(heads[0] // heads[1], dim=0) for t in (k, v))
        for path in layout.paths:
            far = torch.arange(len(path))[:, None] - torch.arange(len(path))
            seen = (far >= 0) & (far < (window or 10**6))
            scores = (q[:, path] @ k[:, path].mT / size**0.5).masked_fill(~seen, -torch.inf)
            out = out.index_put(
                (torch.tensor(path),), (scores.softmax(-1) @ v[:, path]).transpose(0, 1)
            )
        return out

    wanted = outcome(plain, torch.float64)
    for attend in (tree_attention, gathered_attention):
        outputs = outcome(lambda q, k, v: attend(q, k, v, tree, window, None), torch.float32)  # noqa: B023
        for one, other in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [0, 20, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tree_attention_in_16_bits_stays_close(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_attention, "MOST_QUERIES_IN_32_BITS", most)
    prompt = list(range(30))
    layout = lay_out([(prompt + [i] * 9, prompt + [i] * 9) for i in (50, 60)], share=True)
    tree = PrefixTree(layout.nodes, torch.device("cpu"))
    tensors = [torch.randn(2, len(layout.ids), 16) for _ in range(3)]

    def outcome(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [one.to(dtype).requires_grad_() for one in tensors]
        q, k, v = inputs
        output = tree_attention(q, k, v, tree, None, None)
        torch.autograd.backward(output.float().square().sum())
        assert all(one.grad is not None and one.grad.dtype == dtype for one in inputs)
        return [output.float(), *(one.grad.float() for one in inputs if one.grad is not None)]

    for output, exact in zip(outcome(dtype), outcome(torch.float32), strict=True):
        torch.testing.assert_close(output, exact, rtol=0.05, atol=0.1)
