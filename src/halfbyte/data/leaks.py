"""Owns the search for near duplicates between training and held-out prompts."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SHINGLE = 5  # characters
NUM_BUCKETS = 1 << 20
COMMON_FRAC = 0.5  # shingles in more prompts than this are boilerplate and say nothing
BLOCK_ROWS = 2048


def near_duplicates(
    train: list[str], held_out: list[str], threshold: float
) -> list[tuple[int, int, float]]:
    """Pairs (train index, held-out index, Jaccard) whose similarity reaches ``threshold``.

    Similarity is the Jaccard index of the sets of 5-character shingles of the lower-cased prompts,
    without shingles that more than half of all prompts share.
    """
    if not train or not held_out:
        return []
    import numpy as np

    both = _shingles(train + held_out)
    share = np.asarray((both > 0).sum(axis=0)).ravel() / both.shape[0]
    if both.shape[0] >= 20:
        both = both[:, share <= COMMON_FRAC]
    sizes = np.asarray(both.sum(axis=1)).ravel()
    right, right_sizes = both[len(train) :].T.tocsr(), sizes[len(train) :]
    pairs = []
    for start in range(0, len(train), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(train))
        shared = (both[start:stop] @ right).tocoo()
        union = sizes[start:stop][shared.row] + right_sizes[shared.col] - shared.data
        similarity = shared.data / union
        for k in np.flatnonzero(similarity >= threshold):
            pairs.append((start + int(shared.row[k]), int(shared.col[k]), float(similarity[k])))
    return sorted(pairs, key=lambda pair: -pair[2])


def _shingles(texts: list[str]) -> csr_matrix:
    import numpy as np
    from scipy.sparse import csr_matrix

    columns: list[int] = []
    starts = [0]
    for text in texts:
        padded = f" {' '.join(text.casefold().split())} "
        last = max(1, len(padded) - SHINGLE + 1)
        found = {padded[k : k + SHINGLE] for k in range(last)}
        # A shingle's bucket must not depend on the process: hash() does.
        columns += {
            zlib.crc32(shingle.encode("utf-8", "replace")) % NUM_BUCKETS for shingle in found
        }
        starts.append(len(columns))
    data = np.ones(len(columns), dtype=np.int32)
    return csr_matrix((data, columns, starts), shape=(len(texts), NUM_BUCKETS))
