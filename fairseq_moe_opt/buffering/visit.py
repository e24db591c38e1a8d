"""One forward of one layer on its way through the pool.

What is resident is computed first, then what is to be computed in main memory, while the readers fetch what is missing.
A slot is reused only once the forward has asked for the next wave, that is when it has computed what was in it. A
forward waits only while it holds no expert that somebody else could wait for, so forwards in several threads never wait
for each other in a circle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fairseq_moe_opt.buffering.host_compute import HostCompute
from fairseq_moe_opt.buffering.pool import ExpertPool, Load, LoadState, PooledLayer, Slot
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWave, ExpertWeights


@dataclass(frozen=True)
class _Reuse:
    """``key`` is to take the slot of ``victim`` as soon as this forward has computed that."""

    key: ExpertKey
    victim: ExpertKey


class Visit:
    """A forward of ``layer`` that needs the experts ``needed``.

    With ``host_compute``, and ``counts`` of the rows that each of them gets, some may be computed in main memory.
    """

    def __init__(
        self,
        pool: ExpertPool,
        layer: PooledLayer,
        needed: Sequence[int],
        host_compute: HostCompute | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        self._pool, self._layer, self._host_compute = pool, layer, host_compute
        self._group = pool.group(layer)
        self._ready: dict[ExpertKey, Slot] = {}
        self._held: dict[ExpertKey, Slot] = {}
        self._pending: dict[ExpertKey, Load] = {}
        self._reuses: dict[ExpertKey, _Reuse] = {}
        self._unplanned: list[ExpertKey] = []
        self._borrowed: dict[ExpertKey, ExpertWeights] = {}
        keys = [ExpertKey(layer.name, expert) for expert in needed]
        with pool.changed:
            pool.arrive(layer, needed)
            if host_compute is not None and counts is not None:
                self._borrow(host_compute, dict(zip(keys, counts, strict=True)))
            self._obtain([key for key in keys if key not in self._borrowed])
        hits = len(self._ready)
        layer.counters.add_visit(hits, len(needed) - hits)

    def waves(self) -> Iterator[ExpertWave]:
        """Every expert once; a wave's weights are the caller's until the next one is asked for.

        Raises what a fetch raised; the pool is then as good as before, and a later forward may try again.
        """
        try:
            on_host = self._borrowed
            while True:
                self._release()
                if on_host and not self._ready:
                    wave, on_host = _wave(on_host, on_host=True), {}
                    yield wave
                    continue
                slots, stalled = self._next()
                if not slots:
                    return
                self._layer.counters.add_wave(stalled)
                yield _wave({key: slot.weights for key, slot in slots.items() if slot.weights is not None})
        finally:
            self._abandon()

    def _next(self) -> tuple[dict[ExpertKey, Slot], float]:
        """The experts that are here now, waiting for at least one unless all were given; and the seconds waited."""
        stalled = 0.0
        with self._pool.changed:
            while True:
                self._collect()
                if self._ready or not (self._pending or self._unplanned):
                    self._held, self._ready = self._ready, {}
                    return dict(sorted(self._held.items())), stalled
                if self._unplanned and not self._pending:
                    again, self._unplanned = self._unplanned, []
                    self._obtain(again)
                    if self._ready or self._pending:
                        continue
                start = time.perf_counter()
                self._pool.changed.wait()
                stalled += time.perf_counter() - start

    def _borrow(self, host_compute: HostCompute, rows: Mapping[ExpertKey, int]) -> None:
        """Have missing experts computed in main memory where that is what ``host_compute`` decides."""
        for key, count in rows.items():
            if key in self._group.resident or key in self._group.loading:
                continue
            if (weights := host_compute.borrow(key, count)) is not None:
                self._borrowed[key] = weights
        self._layer.counters.add_on_host(len(self._borrowed), sum(rows[key] for key in self._borrowed))

    def _obtain(self, keys: Sequence[ExpertKey]) -> None:
        """Take hold of what is resident, join what is on its way, and have the rest fetched."""
        missing = []
        for key in keys:
            if not self._take(key):
                missing.append(key)
        mine = [key for key, slot in self._ready.items() if slot.pins == 1]
        plan = self._pool.plan(self._layer, missing, mine)
        planned = {load.key for load in plan}
        for load in plan:
            if load.victim is None:
                self._start(load.key, self._group.free.pop())
            elif load.victim in self._reuses:  # promised to another, when this forward planned before
                self._unplanned.append(load.key)
            elif load.victim in self._ready or load.victim in planned:
                self._reuses[load.victim] = _Reuse(load.key, load.victim)
            else:
                self._start(load.key, self._pool.evict(load.victim))
        self._unplanned += missing[len(plan) :]

    def _take(self, key: ExpertKey) -> bool:
        """Hold ``key`` if it is resident, wait for it if it is on its way; False if it is neither."""
        if (slot := self._group.resident.get(key)) is not None:
            slot.pins += 1
            self._ready[key] = slot
            return True
        if (load := self._group.loading.get(key)) is not None:
            self._pool.join(load)
            self._pending[key] = load
            return True
        return False

    def _start(self, key: ExpertKey, slot: Slot) -> None:
        self._pending[key] = self._pool.start(self._layer, key, slot)

    def _collect(self) -> None:
        """Take over the loads that are done; raises the error of one that failed."""
        for key, load in list(self._pending.items()):
            if load.state is LoadState.DONE:
                del self._pending[key]
                if load.error is not None:
                    raise load.error
                self._ready[key] = load.slot

    def _release(self) -> None:
        """The wave that was given has been computed: its slots may be used again."""
        if not self._held:
            return
        mark = self._pool.mark()
        with self._pool.changed:
            held, self._held = self._held, {}
            for key, slot in held.items():
                self._pool.unpin(slot, mark)
                if (reuse := self._reuses.pop(key, None)) is not None:
                    self._replace(reuse, slot)

    def _replace(self, reuse: _Reuse, slot: Slot) -> None:
        """Fetch ``reuse.key`` into the slot it was promised; think again if that is in use elsewhere by now."""
        if self._take(reuse.key):
            return
        if slot.pins or self._group.resident.get(reuse.victim) is not slot:
            self._unplanned.append(reuse.key)
        else:
            self._start(reuse.key, self._pool.evict(reuse.victim))

    def _abandon(self) -> None:
        """Let go of everything: after the last wave, after an error, or when nobody asks for the rest."""
        with self._pool.changed:
            for slot in (*self._held.values(), *self._ready.values()):
                self._pool.unpin(slot)
            for load in self._pending.values():
                self._pool.leave(load)
            self._held, self._ready, self._pending = {}, {}, {}
            if self._host_compute is not None:
                self._host_compute.give_back(self._borrowed)
                self._borrowed = {}


def _wave(weights: Mapping[ExpertKey, ExpertWeights], *, on_host: bool = False) -> ExpertWave:
    return ExpertWave(tuple(key.expert for key in weights), tuple(weights.values()), on_host=on_host)
