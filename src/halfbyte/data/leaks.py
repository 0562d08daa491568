"""Owns the search for near duplicates between training and held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

SHINGLE = 5  # characters
NUM_BUCKETS = 1 << 20
COMMON_FRAC = 0.5  # shingles in more prompts than this are boilerplate and say nothing
BLOCK_ROWS = 2048
BLOCK_PAIRS = 1 << 15
CRC32 = 0xEDB88320  # the reflected polynomial of zlib's crc32


def near_duplicates(
    train: list[str], held_out: list[str], threshold: float
) -> list[tuple[int, int, float]]:
    """Pairs (train index, held-out index, Jaccard) whose similarity reaches ``threshold``.

    Similarity is the Jaccard index of the sets of 5-character shingles of the lower-cased prompts,
    without shingles that more than half of all prompts share. The most similar come first.
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
        found = (rare[start : min(start + BLOCK_ROWS, len(train))] @ right).tocoo()
        order = np.lexsort((found.col, found.row))
        lefts, rights = found.row[order] + start, found.col[order] + len(train)
        # What is shared is no more than the smaller set, and the union no less than the larger.
        smaller = np.minimum(sizes[lefts], sizes[rights])
        alike = smaller >= threshold * np.maximum(sizes[lefts], sizes[rights]) - 1e-6
        lefts, rights = lefts[alike], rights[alike]
        for at in range(0, len(lefts), BLOCK_PAIRS):
            i, j = lefts[at : at + BLOCK_PAIRS], rights[at : at + BLOCK_PAIRS]
            shared = np.asarray(both[i].multiply(both[j]).sum(axis=1)).ravel()
            similarity = shared / (sizes[i] + sizes[j] - shared)
            for k in np.flatnonzero(similarity >= threshold):
                pairs.append((int(i[k]), int(j[k]) - len(train), float(similarity[k])))
    return sorted(pairs, key=lambda pair: -pair[2])


def _rarest(
    both: csr_matrix, counts: NDArray[np.int64], sizes: NDArray[np.int32], threshold: float
) -> csr_matrix:
    """So many of each row's rarest shingles that similar rows have one of them in common.

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
    # The margin keeps rounding from asking for one shingle too many.
    needed = np.maximum(1, np.ceil(threshold * sizes - 1e-6)).astype(np.int64)
    kept = np.maximum(0, sizes - needed + 1)
    place = np.arange(both.nnz) - np.repeat(both.indptr[:-1], sizes)
    columns = ranked.indices[place < np.repeat(kept, sizes)]
    starts = np.concatenate([[0], np.cumsum(kept)])
    return csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape=both.shape)


def _shingles(texts: list[str]) -> csr_matrix:
    """A row for each text, a one for each bucket that one of its shingles falls into."""
    import numpy as np
    from scipy.sparse import csr_matrix

    columns, sizes = [], []
    for start in range(0, len(texts), BLOCK_ROWS):
        block = [f" {' '.join(text.casefold().split())} " for text in texts[start:][:BLOCK_ROWS]]
        found = np.sort(_buckets(block))
        found = found[np.diff(found, prepend=-1) > 0]
        columns.append((found % NUM_BUCKETS).astype(np.int32))
        sizes.append(np.bincount(found // NUM_BUCKETS, minlength=len(block)))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    ones = np.ones(int(starts[-1]), dtype=np.int32)
    return csr_matrix((ones, np.concatenate(columns), starts), shape=(len(texts), NUM_BUCKETS))


def _buckets(texts: list[str]) -> NDArray[np.int64]:
    """Of every shingle of every text: the text's number times ``NUM_BUCKETS``, plus the bucket.

    The bucket is zlib's crc32 of the shingle's UTF-8: it must not depend on the process, as hash()
    does. All shingles take a byte at a time, side by side.
    """
    import numpy as np

    data = np.frombuffer("".join(texts).encode("utf-8", "replace"), dtype=np.uint8)
    at = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))  # where each character begins
    lengths = np.array([len(text) for text in texts])
    number = np.repeat(np.arange(len(texts)), lengths)
    ends = np.cumsum(lengths)[number]
    first = np.arange(len(number))
    last = np.minimum(first + SHINGLE, ends)
    # A text shorter than a shingle is one.
    whole = (first + SHINGLE <= ends) | (first == ends - lengths[number])
    number, begin, size = number[whole], at[first[whole]], (at[last] - at[first])[whole]
    table = _crc32_table()
    crc = np.full(len(number), 0xFFFFFFFF, dtype=np.uint32)
    going = np.arange(len(number))
    for k in range(int(size.max())):
        if k >= size.min():
            going = np.flatnonzero(size > k)
        value = crc[going]
        crc[going] = table[(value ^ data[begin[going] + k]) & 0xFF] ^ (value >> np.uint32(8))
    bucket = (crc ^ np.uint32(0xFFFFFFFF)) % np.uint32(NUM_BUCKETS)
    found: NDArray[np.int64] = number * NUM_BUCKETS + bucket
    return found


def _crc32_table() -> NDArray[np.uint32]:
    import numpy as np

    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(
            table & 1, np.uint32(CRC32) ^ (table >> np.uint32(1)), table >> np.uint32(1)
        )
    return table
