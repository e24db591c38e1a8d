"""The slots that all layers of a model share: what is in them, who is using them, what is on its way.

One lock guards everything here; fetching and computing happen outside of it. A slot is in exactly one of four states:

=========  =================================================  ================================
free       in ``Group.free``                                  nothing valid in it
loading    of a ``Load`` in ``Group.loading``                 being filled, or in the queue for it
resident   in ``Group.resident``, ``pins == 0``               may be evicted
in use     in ``Group.resident``, ``pins > 0``                a forward has it, or will compute it
=========  =================================================  ================================
"""

from __future__ import annotations

import enum
import heapq
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fairseq_moe_opt.buffering.devices import DeviceLink, Mark
from fairseq_moe_opt.buffering.policies import History, PlannedLoad, Policy, Rank, plan_loads, reuse
from fairseq_moe_opt.buffering.readers import AHEAD, URGENT, Readers
from fairseq_moe_opt.buffering.slots import SlotArena, SlotLayout
from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe.cache_report import CacheCounters
from fairseq_moe_opt.moe.protocols import ExpertSource
from fairseq_moe_opt.moe.trace import TraceVisit
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights

GLOBAL, PER_LAYER = "global", "layer"
POOLS = (GLOBAL, PER_LAYER)
"""One pool for all layers, or one a layer as in the paper."""

_PATIENCE = 8
"""Forwards of a layer in which an expert must not be expected, to make room for one that is only guessed."""


@dataclass(eq=False)
class PooledLayer:
    """What the pool has to know of a layer.

    Attributes:
        name: its name in the model.
        phase: ``encoder`` or ``decoder``.
        held: the logical experts that it may ask for, in the order of its store: all E, or a rank's own.
        layout: of its experts in a slot.
        counters: what its hits and misses are added to.
    """

    name: str
    phase: str
    held: tuple[int, ...]
    layout: SlotLayout
    counters: CacheCounters

    @property
    def num_experts(self) -> int:
        """How many it may ask for: E, or E_local."""
        return len(self.held)


@dataclass(eq=False)
class Slot:
    """One place for an expert.

    Attributes:
        index: in the arena.
        pins: forwards that are using it.
        weights: the expert in it, once loaded.
        marks: by stream, behind the last computation that read it.
    """

    index: int
    pins: int = 0
    weights: ExpertWeights | None = None
    marks: dict[int, Mark] = field(default_factory=dict)


class LoadState(enum.Enum):
    """Where a load is."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    CANCELLED = enum.auto()


@dataclass(eq=False)
class Load:
    """An expert on its way into ``slot``; ``pins`` is how many forwards wait for it."""

    key: ExpertKey
    layer: PooledLayer
    slot: Slot
    ahead: bool
    pins: int = 0
    state: LoadState = LoadState.QUEUED
    error: Exception | None = None


@dataclass(eq=False)
class Group:
    """Slots that compete for the same memory."""

    free: list[Slot]
    resident: dict[ExpertKey, Slot] = field(default_factory=dict)
    loading: dict[ExpertKey, Load] = field(default_factory=dict)


class ExpertPool:
    """A fixed arena of slots, the policy that fills it, and the threads that do.

    Args:
        layers: in the model's order.
        slots: of each group: one number for all layers together, or one a layer.
        source: where experts are fetched from.
        policy: what makes room.
        device: of the slots.
        link: how they are filled.
        readers: how many threads fetch.
        depth: loads of one forward that overlap when its experts do not fit together.
    """

    def __init__(
        self,
        layers: Sequence[PooledLayer],
        slots: Sequence[int],
        source: ExpertSource,
        policy: Policy,
        *,
        device: torch.device,
        link: DeviceLink,
        readers: int = 2,
        depth: int = 4,
    ) -> None:
        self.changed = threading.Condition()
        self.layers = {layer.name: layer for layer in layers}
        slot_bytes = max(layer.layout.nbytes for layer in layers)
        self.arena = SlotArena(sum(slots), slot_bytes, device)
        self._groups = _make_groups(layers, slots)
        self._source, self._policy, self._link = source, policy, link
        self._history = History()
        self._readers = Readers(readers)
        self._depth = depth
        self._expected: set[ExpertKey] = set()
        self._ahead: set[ExpertKey] = set()
        self._predictions: dict[str, frozenset[int]] = {}
        self.num_readers = readers

    def group(self, layer: PooledLayer) -> Group:
        """The slots that ``layer`` uses."""
        return self._groups[layer.name]

    def resident(self, layer: str) -> tuple[int, ...]:
        """Experts of ``layer`` that are in slots now, ascending."""
        with self.changed:
            return tuple(sorted(key.expert for key in self._groups[layer].resident if key.layer == layer))

    def mark(self) -> Mark | None:
        """The device's mark behind what the caller has computed so far."""
        return self._link.mark()

    def read(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        """Fetch ``key`` from where misses come from into memory outside the pool."""
        with torch.no_grad():
            return self._source.load(key, into)

    def recall(self, visits: Sequence[TraceVisit]) -> None:
        """Start with the history of ``visits``, and with the experts in the slots that it makes worth keeping."""
        with self.changed:
            for visit in visits:
                self._history.note_visit(visit.layer, visit.experts)
            best_first = sorted(self._history.uses, key=lambda key: (self._rank(key), key), reverse=True)
            for key in best_first:
                group = self._groups[key.layer]
                if group.free:
                    self._start_ahead(self.layers[key.layer], key, group.free.pop())

    def hold(self, layer: PooledLayer, held: Sequence[int]) -> None:
        """Let ``layer`` ask for the experts ``held`` from now on; what it has no more leaves its slots.

        No forward of ``layer`` may be running. Waits for what is on its way.
        """
        group = self._groups[layer.name]
        gone = {ExpertKey(layer.name, expert) for expert in set(layer.held).difference(held)}
        with self.changed:
            self.changed.wait_for(lambda: gone.isdisjoint(group.loading))
            for key in sorted(gone.intersection(group.resident)):
                group.free.append(self.evict(key))
            self._expected -= gone
            self._ahead -= gone
            self._predictions.pop(layer.name, None)
            self._history.forget(gone)
            layer.held = tuple(held)

    # What follows is called with the lock held.

    def arrive(self, layer: PooledLayer, needed: Sequence[int]) -> None:
        """A forward of ``layer`` wants ``needed``: note it, and drop what was fetched ahead for it in vain."""
        self._history.note_visit(layer.name, needed)
        wanted = {ExpertKey(layer.name, expert) for expert in needed}
        predicted = self._predictions.pop(layer.name, None)
        if predicted is not None:
            layer.counters.add_prediction(len(predicted), len(predicted.intersection(needed)), len(needed))
        layer.counters.add_used_ahead(len(self._ahead & wanted))
        self._expected = {key for key in self._expected if key.layer != layer.name}
        self._ahead = {key for key in self._ahead if key.layer != layer.name}
        group = self._groups[layer.name]
        for key, load in list(group.loading.items()):
            if load.ahead and key.layer == layer.name and key not in wanted and load.state is LoadState.QUEUED:
                load.state = LoadState.CANCELLED
                del group.loading[key]
                group.free.append(load.slot)
                layer.counters.add_fetched_ahead(-1)

    def last_needed(self, layer: PooledLayer) -> frozenset[int]:
        """What the last forward of ``layer`` asked for."""
        return self._history.active.get(layer.name, frozenset())

    def fetch_ahead(self, layer: PooledLayer, predicted: Sequence[int], *, certain: bool) -> None:
        """Fetch experts that the next forward of ``layer`` is expected to ask for, as far as that is worth it.

        They take free slots, or those of experts that are expected to be needed later than ``layer`` comes, and for a
        guess that is not ``certain`` much later; nothing that is in use or expected makes room.
        """
        if not predicted:
            return
        self._predictions[layer.name] = frozenset(predicted)
        group = self._groups[layer.name]
        keys = [ExpertKey(layer.name, expert) for expert in predicted]
        self._expected.update(key for key in keys if key in group.resident)
        missing = [key for key in keys if key not in group.resident and key not in group.loading]
        room = len(group.free)
        for key in missing[:room]:
            self._start_ahead(layer, key, group.free.pop())
        for key, victim in zip(missing[room:], self._dispensable(layer, len(missing) - room, certain), strict=False):
            self._start_ahead(layer, key, self.evict(victim))

    def _dispensable(self, layer: PooledLayer, count: int, certain: bool) -> list[ExpertKey]:
        """At most ``count`` residents that are needed later than ``layer`` comes, the latest first."""
        soon = self._history.until_forward(layer.name)
        if math.isinf(soon):  # for the first or second time: nobody guesses for a layer that is far away
            soon = 1.0
        elif not certain:
            soon += _PATIENCE * self._history.period(layer.name)
        later = [
            key
            for key, slot in self._groups[layer.name].resident.items()
            if not slot.pins and key not in self._expected and self._history.until_use(key)[0] > soon
        ]
        return heapq.nsmallest(count, later, key=lambda key: (reuse(self._history, key), key))

    def _start_ahead(self, layer: PooledLayer, key: ExpertKey, slot: Slot) -> None:
        self._history.note_load(key)
        self._expected.add(key)
        self._ahead.add(key)
        layer.counters.add_fetched_ahead(1)
        load = Load(key, layer, slot, ahead=True)
        self._groups[layer.name].loading[key] = load
        self._readers.submit(AHEAD, lambda: self._fetch(load))

    def plan(
        self, layer: PooledLayer, missing: Sequence[ExpertKey], hits: Iterable[ExpertKey]
    ) -> tuple[PlannedLoad, ...]:
        """What makes room for ``missing``; ``hits`` are in use by the caller alone, and computed first."""
        for key in missing:
            self._history.note_load(key)
        group = self._groups[layer.name]
        idle = [key for key, slot in group.resident.items() if not slot.pins]
        return plan_loads(missing, len(group.free), idle, tuple(hits), self._rank, depth=self._depth)

    def evict(self, key: ExpertKey) -> Slot:
        """Take ``key``, which nobody is using, out of its slot; the slot is the caller's."""
        layer = self.layers[key.layer]
        self._expected.discard(key)
        layer.counters.add_eviction()
        return self._groups[key.layer].resident.pop(key)

    def start(self, layer: PooledLayer, key: ExpertKey, slot: Slot) -> Load:
        """Have ``key`` fetched into ``slot``, which is in no other state now; a forward waits for it."""
        load = Load(key, layer, slot, ahead=False, pins=1)
        self._groups[layer.name].loading[key] = load
        self._readers.submit(URGENT, lambda: self._fetch(load))
        return load

    def join(self, load: Load) -> None:
        """Wait for a load that somebody else started; if it was fetched ahead, it is urgent now."""
        load.pins += 1
        if load.ahead and load.state is LoadState.QUEUED:
            load.ahead = False
            self._readers.submit(URGENT, lambda: self._fetch(load))

    def leave(self, load: Load) -> None:
        """No longer wait for ``load``."""
        if load.state is LoadState.DONE and load.error is None:
            self.unpin(load.slot)
        else:
            load.pins -= 1

    def unpin(self, slot: Slot, mark: Mark | None = None) -> None:
        """One forward fewer uses ``slot``; ``mark`` is behind what it computed with it."""
        slot.pins -= 1
        if mark is not None:
            slot.marks[mark.stream] = mark
        self.changed.notify_all()

    def _rank(self, key: ExpertKey) -> Rank:
        return (key in self._expected, *self._policy(self._history, key))

    def _fetch(self, load: Load) -> None:
        """The work of a reader."""
        with self.changed:
            if load.state is not LoadState.QUEUED:
                return
            load.state = LoadState.RUNNING
        error: Exception | None = None
        try:
            load.layer.counters.add_read(self._fill(load))
        except Exception as failure:  # raised again by the forward that waits for it
            error = failure
        with self.changed:
            self._finish(load, error)

    def _fill(self, load: Load) -> ExpertRead:
        slot = load.slot
        slot.weights = self.arena.view(slot.index, load.layer.layout)
        read = self._link.fetch(self._source, load.key, slot.weights, slot.marks.values())
        slot.marks.clear()
        return read

    def _finish(self, load: Load, error: Exception | None) -> None:
        group = self._groups[load.layer.name]
        del group.loading[load.key]
        load.state, load.error = LoadState.DONE, error
        if error is None:
            load.slot.pins = load.pins
            group.resident[load.key] = load.slot
        else:
            group.free.append(load.slot)
            self._expected.discard(load.key)
            self._ahead.discard(load.key)
        self.changed.notify_all()

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertPool:
        # Experts never change, so a copied model shares them.
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        raise MoEError("a model with buffered experts cannot be pickled: its experts are not in it; load it again")


def _make_groups(layers: Sequence[PooledLayer], slots: Sequence[int]) -> dict[str, Group]:
    """The group of each layer: all the same one, or one each."""
    indices = iter(range(sum(slots)))
    groups = [Group([Slot(next(indices)) for _ in range(count)][::-1]) for count in slots]
    if len(groups) == 1:
        groups *= len(layers)
    return {layer.name: group for layer, group in zip(layers, groups, strict=True)}
