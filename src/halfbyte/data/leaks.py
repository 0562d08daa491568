"""Owns the search for near duplicates between training and held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

SHINGLE = 5  # characters
NUM_BUCKETS = 1 << 20
COMMON_FRAC = 0.5  # shingles in a larger share of prompts are boilerplate and are ignored
BLOCK_ROWS = 2048
BLOCK_PAIRS = 1 << 15
CRC32 = 0xEDB88320  # the reflected polynomial of zlib's crc32


def near_duplicates(
    train: list[str], held_out: list[str], threshold: float
) -> list[tuple[int, int, float]]:
    """Return pairs (train index, held-out index, similarity) that reach ``threshold``.

    Similarity is the Jaccard index of the sets of 5-character shingles of the lower-cased prompts,
    without shingles that more than half of all prompts share. The most similar pairs come first.
    """
    if not train or not held_out:
        return []
    import numpy as np

    both = _shingles(train + held_out)
    counts = np.bincount(both.indices, minlength=NUM_BUCKETS)
    if both.shape[0] >= 20:
        both = both[:, counts / both.shape[0] <= COMMON_FRAC]
        counts = np.bincount(both.indices, minlength=both.shape[1])
    sizes = np.diff(both.indptr)
    rare = _rarest(both, counts, sizes, threshold)
    right = rare[len(train) :].T.tocsr()
    pairs = []
    for start in range(0, len(train), BLOCK_ROWS):
        candidates = (rare[start : min(start + BLOCK_ROWS, len(train))] @ right).tocoo()
        order = np.lexsort((candidates.col, candidates.row))
        lefts, rights = candidates.row[order] + start, candidates.col[order] + len(train)
        # The intersection is at most the smaller set, and the union at least the larger one.
        smaller = np.minimum(sizes[lefts], sizes[rights])
        possible = smaller >= threshold * np.maximum(sizes[lefts], sizes[rights]) - 1e-6
        lefts, rights = lefts[possible], rights[possible]
        for first in range(0, len(lefts), BLOCK_PAIRS):
            i, j = lefts[first : first + BLOCK_PAIRS], rights[first : first + BLOCK_PAIRS]
            shared = np.asarray(both[i].multiply(both[j]).sum(axis=1)).ravel()
            similarity = shared / (sizes[i] + sizes[j] - shared)
            for k in np.flatnonzero(similarity >= threshold):
                pairs.append((int(i[k]), int(j[k]) - len(train), float(similarity[k])))
    return sorted(pairs, key=lambda pair: -pair[2])


def _rarest(
    both: csr_matrix, counts: NDArray[np.int64], sizes: NDArray[np.int32], threshold: float
) -> csr_matrix:
    """Return as many of each row's rarest shingles as make similar rows have one of them in common.

    Two sets of similarity t share at least t·n of the n shingles of either. So they share one of the
    rarest n - ⌈t·n⌉ + 1, as long as both rank shingles alike (prefix filter: Chaudhuri et al., ICDE
    2006; Bayardo et al., WWW 2007).
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    rank = np.empty(len(counts), dtype=np.int32)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    ranked = csr_matrix((both.data, rank[both.indices], both.indptr), shape=both.shape)
    ranked.sort_indices()
    # The margin keeps rounding errors from requiring one shingle too many.
    min_shared = np.maximum(1, np.ceil(threshold * sizes - 1e-6)).astype(np.int64)
    num_kept = np.maximum(0, sizes - min_shared + 1)
    index_in_row = np.arange(both.nnz) - np.repeat(both.indptr[:-1], sizes)
    columns = ranked.indices[index_in_row < np.repeat(num_kept, sizes)]
    starts = np.concatenate([[0], np.cumsum(num_kept)])
    return csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape=both.shape)


def _shingles(texts: list[str]) -> csr_matrix:
    """Return a matrix with a row for each text and a 1 for each bucket that holds one of its shingles."""
    import numpy as np
    from scipy.sparse import csr_matrix

    columns, sizes = [], []
    for start in range(0, len(texts), BLOCK_ROWS):
        block = [f" {' '.join(text.casefold().split())} " for text in texts[start:][:BLOCK_ROWS]]
        buckets = np.sort(_buckets(block))
        buckets = buckets[np.diff(buckets, prepend=-1) > 0]
        columns.append((buckets % NUM_BUCKETS).astype(np.int32))
        sizes.append(np.bincount(buckets // NUM_BUCKETS, minlength=len(block)))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    ones = np.ones(int(starts[-1]), dtype=np.int32)
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
