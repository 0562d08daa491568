"""Owns passes of one token each that are recorded once as a CUDA graph and replayed for the tokens after.

A step of a 4B model is some 2,000 launches, which take the host longer than the card. A graph is one launch. It
has fixed shapes and addresses: it is recorded for each number of inputs, and again when the cache has grown.
On a CPU, where passes are computed as on CUDA, the same pass runs without a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from halfbyte.faults import is_out_of_memory
from halfbyte.forward.kv_cache import KVCache
from halfbyte.forward.slot_decode import DecodeBatch
from halfbyte.forward.slot_paths import SlotInput

SEEN_BEFORE = 2  # passes of a kind that are computed plainly before one is recorded
MAX_RECORDS = 16  # each holds its temporaries
WARM_UPS = 2  # so that libraries allocate their workspaces outside the graph

# How many of the first slots hold them, how many inputs, and by adapter how many of them.
Kind = tuple[int, int, tuple[tuple[str | None, int], ...]]
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DecodeBatch], torch.Tensor]


class DecodeRecorder:
    """Records passes of one token an input, by their kind.

    Args:
        call: computes logits (M, V) of a pass, from ids (M,), positions (M,), indices of logits (M,) and the batch.
        cache: keys and values of all slots.
        device: where they lie.

    Attributes:
        refusal: why passes are not recorded any more, or "".
        num_replayed: passes that a record has computed.
    """

    def __init__(self, call: Call, cache: KVCache, device: torch.device) -> None:
        self.call, self.cache, self.device = call, cache, device
        self.refusal = ""
        self.num_replayed = 0
        self._seen: dict[Kind, int] = {}
        self._records: dict[Kind, RecordedStep] = {}
        self._version = cache.version

    def logits(self, inputs: Sequence[SlotInput]) -> torch.Tensor | None:
        """Return logits (M, V), valid until the next pass; None where the pass is of a kind not recorded."""
        decodes = all(len(one.ids) == 1 and one.num_logits == 1 for one in inputs)
        longest = max(one.end for one in inputs) - self.cache.num_shared
        if self.refusal or not decodes or longest > self.cache.capacity:
            return None
        if self.cache.version != self._version:  # records hold addresses and shapes of its storage
            self._version = self.cache.version
            self._records.clear()
        padded = _padded(inputs)
        kind = _kind(padded, self.cache.num_slots)
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] <= SEEN_BEFORE:
            return None
        if kind not in self._records:
            if len(self._records) == MAX_RECORDS:
                del self._records[next(iter(self._records))]
            try:
                self._records[kind] = RecordedStep(self, padded, kind[0])
            except RuntimeError as error:
                if is_out_of_memory(error):
                    self._records.clear()
                self._refuse(f"{type(error).__name__}: {error}".splitlines()[0])
                return None
        self.num_replayed += 1
        return self._records[kind].logits(padded)[: len(inputs)]

    def _refuse(self, why: str) -> None:
        self.refusal = why
        print(f"steps of generation are not recorded: {why}", file=sys.stderr)


class RecordedStep:
    """A pass of one kind, recorded for its first inputs.

    Args:
        owner: whose model, cache and device it uses.
        inputs: padded ones.
        num_slots: so many of the first slots hold them.
    """

    def __init__(self, owner: DecodeRecorder, inputs: Sequence[SlotInput], num_slots: int) -> None:
        is_cuda = owner.device.type == "cuda"
        self.num_shared = owner.cache.num_shared
        self.host = torch.empty((4, len(inputs)), dtype=torch.int64, pin_memory=is_cuda)
        self.numbers = torch.empty_like(self.host, device=owner.device)
        self.batch = DecodeBatch(self.numbers, num_slots, owner.cache, _ranges(inputs))
        self._fill(inputs)

        def step() -> torch.Tensor:
            batch = self.batch
            batch.begin()
            return owner.call(batch.ids, batch.positions, batch.indices, batch)

        self.replay = _recorded(step) if is_cuda else step

    def logits(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Return the logits (M, V) of other inputs of the same kind."""
        self._fill(inputs)
        return self.replay()

    def _fill(self, inputs: Sequence[SlotInput]) -> None:
        columns = [(one.ids[0], one.start, one.slot, one.start - self.num_shared) for one in inputs]
        if self.host.is_pinned():  # the copy of the pass before may still read it
            torch.cuda.current_stream().synchronize()
        self.host.copy_(torch.tensor(columns).T)
        self.numbers.copy_(self.host, non_blocking=True)


def _recorded(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """RecordedStep a step as a CUDA graph; return what replays it, into the same tensor each time."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def _padded(inputs: Sequence[SlotInput]) -> list[SlotInput]:
    """Return inputs up to the next power of two: the last one again, which writes and computes the same."""
    return [*inputs, *[inputs[-1]] * (_power_of_two(len(inputs)) - len(inputs))]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _kind(inputs: Sequence[SlotInput], num_slots: int) -> Kind:
    names = [one.adapter for one in inputs]
    held = min(_power_of_two(max(one.slot for one in inputs) + 1), num_slots)
    return held, len(inputs), tuple((name, names.count(name)) for name in dict.fromkeys(names))


def _ranges(inputs: Sequence[SlotInput]) -> list[tuple[str, slice]]:
    """Return the names of adapters with the range of their inputs, which stand next to each other."""
    names = [one.adapter for one in inputs]
    return [
        (name, slice(names.index(name), names.index(name) + names.count(name)))
        for name in dict.fromkeys(names)
        if name is not None
    ]
