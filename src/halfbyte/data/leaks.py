"""Owns the search for near duplicates between training and held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

SHINGLE = 5  # characters
NUM_BUCKETS = 1 << 20
COMMON_FRAC = 0.5  # shingles in a larger share of prompts are boilerplate and are ignored
BLOCK_ROWS = 2048
MAX_SHINGLES = 1 << 25  # that are held in memory of either side
SAMPLE = 1 << 16  # prompts of either side that are counted
BLOCK_PAIRS = 1 << 15
CRC32 = 0xEDB88320  # the reflected polynomial of zlib's crc32


def near_duplicates(
    train: Sequence[str], held_out: Sequence[str], threshold: float, limit: int
) -> tuple[list[tuple[int, int, float]], int]:
    """Return pairs (train index, held-out index, similarity) that reach ``threshold``, and their number.

    Similarity is the Jaccard index of the sets of 5-character shingles of the lower-cased prompts,
    without shingles that more than half of all prompts share; of many prompts, ``SAMPLE`` evenly spaced
    ones are counted. The most similar ``limit`` pairs are returned, those first. Prompts are read in blocks.
    """
    if not train or not held_out:
        return [], 0
    import numpy as np

    common = _Common(train, held_out)
    pairs: list[tuple[int, int, float]] = []
    total = 0
    for first, right in common.blocks(held_out, common.rows_in_memory):
        right_sizes = np.diff(right.indptr)
        rare_right = common.rarest(right, threshold).T.tocsr()
        for start, left in common.blocks(train, BLOCK_ROWS):
            left_sizes = np.diff(left.indptr)
            candidates = (common.rarest(left, threshold) @ rare_right).tocoo()
            order = np.lexsort((candidates.col, candidates.row))
            i, j = candidates.row[order], candidates.col[order]
            # The intersection is at most the smaller set, and the union at least the larger one.
            smaller = np.minimum(left_sizes[i], right_sizes[j])
            larger = np.maximum(left_sizes[i], right_sizes[j])
            possible = smaller >= threshold * larger - 1e-6
            i, j = i[possible], j[possible]
            for at in range(0, len(i), BLOCK_PAIRS):
                a, b = i[at : at + BLOCK_PAIRS], j[at : at + BLOCK_PAIRS]
                shared = np.asarray(left[a].multiply(right[b]).sum(axis=1)).ravel()
                similarity = shared / (left_sizes[a] + right_sizes[b] - shared)
                near = np.flatnonzero(similarity >= threshold)
                total += len(near)
                near = near[np.lexsort((b[near], a[near], -similarity[near]))][:limit]
                pairs += [
                    (start + int(a[k]), first + int(b[k]), float(similarity[k])) for k in near
                ]
            pairs = sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))[:limit]
    return pairs, total


class _Common:
    """How common each shingle is, and the shingles of prompts without the most common ones."""

    def __init__(self, train: Sequence[str], held_out: Sequence[str]) -> None:
        import numpy as np

        counts = np.zeros(NUM_BUCKETS, dtype=np.int64)
        num_counted = num_kept = 0
        self._kept: dict[int, csr_matrix] = {}  # shingles of the blocks of few prompts
        for texts in (train, held_out):
            step = 1 + len(texts) // SAMPLE
            for start in range(0, len(texts), BLOCK_ROWS):
                shingles = _shingles(texts[start : start + BLOCK_ROWS : step])
                counts += np.bincount(shingles.indices, minlength=NUM_BUCKETS)
                num_counted += shingles.shape[0]
                num_kept += shingles.nnz
                if texts is train and step == 1 and num_kept <= MAX_SHINGLES:
                    self._kept[start] = shingles
        self._train = train
        self.rows_in_memory = max(1, MAX_SHINGLES * num_counted // max(1, int(counts.sum())))
        self._used = np.ones(NUM_BUCKETS, dtype=bool)
        if num_counted >= 20:
            self._used = counts / num_counted <= COMMON_FRAC
        self._rank = np.empty(NUM_BUCKETS, dtype=np.int32)
        self._rank[np.argsort(counts, kind="stable")] = np.arange(NUM_BUCKETS, dtype=np.int32)

    def blocks(self, texts: Sequence[str], num_rows: int) -> Iterator[tuple[int, csr_matrix]]:
        """Yield the number of the first prompt of each block, and the shingles of its prompts."""
        import numpy as np
        from scipy.sparse import csr_matrix

        for start in range(0, len(texts), num_rows):
            kept = self._kept.get(start) if texts is self._train else None
            block = _shingles(texts[start : start + num_rows]) if kept is None else kept
            used = self._used[block.indices]
            starts = np.concatenate([[0], np.cumsum(used)])[block.indptr]
            ones = np.ones(int(starts[-1]), dtype=np.int8)
            yield start, csr_matrix((ones, block.indices[used], starts), shape=block.shape)

    def rarest(self, block: csr_matrix, threshold: float) -> csr_matrix:
        """Return the rarest shingles of each row, as ``_rarest`` does."""
        return _rarest(block, self._rank, threshold)


def _rarest(block: csr_matrix, rank: NDArray[np.int32], threshold: float) -> csr_matrix:
    """Return as many of each row's rarest shingles as make similar rows have one of them in common.

    Two sets of similarity t share at least t·n of the n shingles of either. So they share one of the
    rarest n - ⌈t·n⌉ + 1, as long as both rank shingles alike (prefix filter: Chaudhuri et al., ICDE
    2006; Bayardo et al., WWW 2007).
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    sizes = np.diff(block.indptr)
    ranked = csr_matrix((block.data, rank[block.indices], block.indptr), shape=block.shape)
    ranked.sort_indices()
    # The margin keeps rounding errors from requiring one shingle too many.
    min_shared = np.maximum(1, np.ceil(threshold * sizes - 1e-6)).astype(np.int64)
    num_kept = np.maximum(0, sizes - min_shared + 1)
    index_in_row = np.arange(block.nnz) - np.repeat(block.indptr[:-1], sizes)
    columns = ranked.indices[index_in_row < np.repeat(num_kept, sizes)]
    starts = np.concatenate([[0], np.cumsum(num_kept)])
    return csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape=block.shape)


def _shingles(texts: Sequence[str]) -> csr_matrix:
    """Return a matrix with a row for each text and a 1 for each bucket that holds one of its shingles."""
    import numpy as np
    from scipy.sparse import csr_matrix

    columns, sizes = [], []
    for start in range(0, len(texts), BLOCK_ROWS):
        block = [
            f" {' '.join(text.casefold().split())} " for text in texts[start : start + BLOCK_ROWS]
        ]
        buckets = np.sort(_buckets(block))
        buckets = buckets[np.diff(buckets, prepend=-1) > 0]
        columns.append((buckets % NUM_BUCKETS).astype(np.int32))
        sizes.append(np.bincount(buckets // NUM_BUCKETS, minlength=len(block)))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    ones = np.ones(int(starts[-1]), dtype=np.int8)
    return csr_matrix((ones, np.concatenate(columns), starts), shape=(len(texts), NUM_BUCKETS))


def _buckets(texts: list[str]) -> NDArray[np.int64]:
    """Return, for every shingle of every text, the text's number times ``NUM_BUCKETS`` plus the bucket.

    The bucket is zlib's crc32 of the shingle's UTF-8: unlike hash(), it must not depend on the process.
    The checksums of all shingles advance together, one byte at a time.
    """
    import numpy as np

    data = np.frombuffer("".join(texts).encode("utf-8", "replace"), dtype=np.uint8)
    # Offset of the first byte of each character.
    offsets = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))
    lengths = np.array([len(text) for text in texts])
    number = np.repeat(np.arange(len(texts)), lengths)
    ends = np.cumsum(lengths)[number]
    first = np.arange(len(number))
    last = np.minimum(first + SHINGLE, ends)
    # A text shorter than a shingle counts as one shingle.
    whole = (first + SHINGLE <= ends) | (first == ends - lengths[number])
    number, begin, size = (
        number[whole],
        offsets[first[whole]],
        (offsets[last] - offsets[first])[whole],
    )
    table = _crc32_table()
    crc = np.full(len(number), 0xFFFFFFFF, dtype=np.uint32)
    active = np.arange(len(number))
    for k in range(int(size.max())):
        if k >= size.min():
            active = np.flatnonzero(size > k)
        value = crc[active]
        crc[active] = table[(value ^ data[begin[active] + k]) & 0xFF] ^ (value >> np.uint32(8))
    bucket = (crc ^ np.uint32(0xFFFFFFFF)) % np.uint32(NUM_BUCKETS)
    buckets: NDArray[np.int64] = number * NUM_BUCKETS + bucket
    return buckets


def _crc32_table() -> NDArray[np.uint32]:
    import numpy as np

    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(
            table & 1, np.uint32(CRC32) ^ (table >> np.uint32(1)), table >> np.uint32(1)
        )
    return table
