"""Attention of inputs of one token: what each attends to, whatever lies beside it in the cache."""

from __future__ import annotations

import pytest
import torch

from halfbyte.forward import slot_decode
from halfbyte.forward.slot_decode import blocks_of

HEADS, GROUPS, SIZE, CAPACITY = 6, 2, 8, 24
CPU = torch.device("cpu")


def alone(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention (H, D) of one query (H, D) to keys and values (G, C, D), in fp64."""
    q = query.double().view(GROUPS, -1, SIZE)
    weights = (q @ keys.double().transpose(1, 2) * scale).softmax(dim=2)
    return (weights @ values.double()).view(HEADS, SIZE)


@pytest.mark.parametrize("window", [None, 3, 9, 40])
@pytest.mark.parametrize("num_shared", [0, 7])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_attends_to_its_own_slot_behind_the_shared_tokens(
    window: int | None,
    num_shared: int,
    at_once: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if at_once:  # the way of other devices
        monkeypatch.setattr(slot_decode, "_attend_in_parts", slot_decode._attend_at_once)
    random = torch.Generator().manual_seed(0)

    def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, then = torch.randn((2, *shape, SIZE), generator=random).to(dtype)
        return first, then

    cached, shared = pair(300, GROUPS, CAPACITY), pair(GROUPS, num_shared)
    slots = [3, 260, 4, 130, 259, 280, 9]  # three blocks, none of them full
    positions = [num_shared + own for own in (0, 5, 23, 11, 1, 17, 2)]
    queries = torch.randn((len(slots), HEADS, SIZE), generator=random).to(dtype)
    places = [2, 9, 4, 0, 1, 7, 3]
    blocks = blocks_of(slots, places, positions, CPU)
    assert len(blocks) == 3
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    seen = []
    for block in blocks:
        numbers = [places.index(int(place)) for place in block.tokens]
        out = block.attend(
            queries[numbers], cached, shared if num_shared else None, window, SIZE**-0.5
        )
        assert out.dtype == dtype
        for number, own in zip(numbers, out, strict=True):
            end = positions[number] + 1
            first = 0 if window is None else max(0, end - window)
            keys, values = (
                torch.cat([shared[n], cached[n][slots[number], :, : end - num_shared]], dim=1)
                for n in range(2)
            )
            wanted = alone(queries[number], keys[:, first:], values[:, first:], SIZE**-0.5)
            assert torch.allclose(own.double(), wanted, atol=tolerance, rtol=tolerance)
            seen.append(number)
    assert sorted(seen) == list(range(len(slots)))
