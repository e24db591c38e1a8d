"""A tier of main memory between the slots and the files, in which experts are kept as they are stored."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fairseq_moe_opt.buffering.slots import SlotArena, SlotLayout, slot_bytes_for
from fairseq_moe_opt.moe.protocols import ExpertSource
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights

TIER = "host"

_REQUESTS_PER_AGE = 16
"""All counts are halved after so many requests a slot, so that what was asked for long ago is forgotten."""


@dataclass(eq=False)
class _Entry:
    """An expert in main memory, and how many readers are copying it at the moment."""

    slot: int
    weights: ExpertWeights
    readers: int = 0


class HostTier:
    """An expert source that remembers what it read from ``inner`` in a fixed arena, page-locked when it serves a GPU.

    It sees only what the slots miss, often scans that come round again and again, so it lets an expert in only when
    that was asked for more often than the one that would have to go. Experts keep the dtype they are stored in: files
    in half precision take half the room here that they take in slots of single precision.

    Args:
        inner: where experts come from.
        layouts: of each layer's experts as they are stored.
        num_slots: experts that are kept.
        pinned: for a GPU.
    """

    def __init__(
        self, inner: ExpertSource, layouts: Mapping[str, SlotLayout], num_slots: int, *, pinned: bool = False
    ) -> None:
        self._inner, self._layouts = inner, layouts
        self.arena = SlotArena(num_slots, slot_bytes_for(layouts.values()), torch.device("cpu"), pinned=pinned)
        self._free = list(range(num_slots))
        self._entries: dict[ExpertKey, _Entry] = {}
        self._filling: set[ExpertKey] = set()
        self._requests: Counter[ExpertKey] = Counter()
        self._until_age = _REQUESTS_PER_AGE * num_slots
        self._lock = threading.Lock()

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        """Copy from memory when it is there; else read it, keep it if there is room, and copy it."""
        entry = self._find(key)
        if entry is not None:
            try:
                copy_expert(entry.weights, into)
            finally:
                self._done_with(entry)
            return ExpertRead(TIER, entry.weights.nbytes)
        slot = self._reserve(key)
        if slot is None:
            return self._inner.load(key, into)
        return self._read_through(key, slot, into)

    def layout(self, layer: str) -> SlotLayout:
        """Of the experts of ``layer`` as they are kept here."""
        return self._layouts[layer]

    def borrow(self, key: ExpertKey) -> ExpertWeights | None:
        """The weights of ``key`` where they are kept, which stay until ``give_back``; None when they are not here."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:  # asked for again by ``load``, where it counts
                return None
            self._note_request(key)
            entry.readers += 1
            return entry.weights

    def give_back(self, key: ExpertKey) -> None:
        """What ``borrow`` gave is no longer read."""
        with self._lock:
            self._entries[key].readers -= 1

    def resident(self) -> frozenset[ExpertKey]:
        """The experts that are kept now."""
        with self._lock:
            return frozenset(self._entries)

    def _read_through(self, key: ExpertKey, slot: int, into: ExpertWeights) -> ExpertRead:
        entry = _Entry(slot, self.arena.view(slot, self._layouts[key.layer]), readers=1)
        try:
            read = self._inner.load(key, entry.weights)
        except BaseException:
            with self._lock:
                self._filling.discard(key)
                self._free.append(slot)
            raise
        with self._lock:
            self._filling.discard(key)
            self._entries[key] = entry
        try:
            copy_expert(entry.weights, into)
        finally:
            self._done_with(entry)
        return read

    def _find(self, key: ExpertKey) -> _Entry | None:
        with self._lock:
            self._note_request(key)
            entry = self._entries.get(key)
            if entry is not None:
                entry.readers += 1
            return entry

    def _note_request(self, key: ExpertKey) -> None:
        self._requests[key] += 1
        self._until_age -= 1
        if not self._until_age:
            self._until_age = _REQUESTS_PER_AGE * self.arena.num_slots
            self._requests = Counter({one: count // 2 for one, count in self._requests.items()})

    def _reserve(self, key: ExpertKey) -> int | None:
        """A slot for ``key``; None when nothing is to make room for it, or another reader is already fetching it."""
        with self._lock:
            if key in self._filling:
                return None
            if not self._free:
                idle = [other for other, entry in self._entries.items() if not entry.readers]
                victim = min(idle, key=lambda other: (self._requests[other], other), default=None)
                if victim is None or self._requests[victim] >= self._requests[key]:
                    return None
                self._free.append(self._entries.pop(victim).slot)
            self._filling.add(key)
            return self._free.pop()

    def _done_with(self, entry: _Entry) -> None:
        with self._lock:
            entry.readers -= 1


def copy_expert(stored: ExpertWeights, into: ExpertWeights) -> None:
    """Copy all tensors; changes dtype and device where they differ."""
    for source, target in zip(stored.tensors(), into.tensors(), strict=True):
        target.copy_(source)
