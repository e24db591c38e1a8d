"""Which resident expert makes room for another: pure functions, the same in the runtime and in the simulator.

A policy ranks experts by what is known of their past; the lowest rank goes first. None of them ever sees an expert
that a forward has still to compute.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.types import ExpertKey

Rank = tuple[float, ...]
Policy = Callable[["History", ExpertKey], Rank]

NEVER = -math.inf

HALF_LIFE = 128
"""Visits after which a use counts half in ``History.heat``."""

_RECENT, _STEADY = 0.5, 0.5 ** (1 / 64)
"""What a layer's forward leaves of the two estimates of how likely an expert is used: one follows at once, the other
takes 64 forwards to forget half. Chosen by simulation over traces of the demo model and skewed, sticky random ones."""


@dataclass
class _Frequency:
    """How likely an expert is in a forward of its layer, as of forward number ``forward``."""

    recent: float = 0.0
    steady: float = 0.0
    forward: int = 0

    def note_use(self, forward: int) -> None:
        self.recent = self.recent * _RECENT ** (forward - self.forward) + 1 - _RECENT
        self.steady = self.steady * _STEADY ** (forward - self.forward) + 1 - _STEADY
        self.forward = forward

    def at(self, forward: int) -> float:
        passed = forward - self.forward
        return float(self.recent * _RECENT**passed + self.steady * _STEADY**passed) / 2


@dataclass
class _Layer:
    """When a layer's forwards come: how many there were, the visit of the last, and visits between the last two."""

    forwards: int = 0
    last: int = 0
    period: float = math.inf


@dataclass
class History:
    """What was asked for and loaded so far. Time counts visits: forwards of any layer.

    Attributes:
        now: visits so far.
        active: the last set that each layer asked for.
        last_use: the visit of an expert's last use.
        uses: how often it was asked for.
        heat: log2 of its uses, each halved every ``HALF_LIFE`` visits, plus ``now / HALF_LIFE`` at its last use, which
            orders experts by their decayed frequency at any later time.
        loaded: the number of its last load, counted over all loads.
    """

    now: int = 0
    active: dict[str, frozenset[int]] = field(default_factory=dict)
    last_use: dict[ExpertKey, int] = field(default_factory=dict)
    uses: dict[ExpertKey, int] = field(default_factory=dict)
    heat: dict[ExpertKey, float] = field(default_factory=dict)
    loaded: dict[ExpertKey, int] = field(default_factory=dict)
    _layers: dict[str, _Layer] = field(default_factory=dict)
    _frequency: dict[ExpertKey, _Frequency] = field(default_factory=dict)
    _loads: int = 0

    def note_visit(self, layer: str, needed: Sequence[int]) -> None:
        """A forward of ``layer`` asked for the experts ``needed``."""
        self.now += 1
        self.active[layer] = frozenset(needed)
        timing = self._layers.setdefault(layer, _Layer())
        if timing.forwards:
            timing.period = self.now - timing.last
        timing.forwards, timing.last = timing.forwards + 1, self.now
        now_log = self.now / HALF_LIFE
        for expert in needed:
            key = ExpertKey(layer, expert)
            self.last_use[key] = self.now
            self.uses[key] = self.uses.get(key, 0) + 1
            self.heat[key] = now_log + math.log2(1.0 + 2.0 ** (self.heat.get(key, NEVER) - now_log))
            self._frequency.setdefault(key, _Frequency()).note_use(timing.forwards)

    def note_load(self, key: ExpertKey) -> None:
        """A load of ``key`` was decided."""
        self._loads += 1
        self.loaded[key] = self._loads

    def forget(self, keys: Collection[ExpertKey]) -> None:
        """These experts are asked for no more."""
        for known in (self.last_use, self.uses, self.heat, self.loaded, self._frequency):
            for key in keys:
                known.pop(key, None)
        for layer, experts in self.active.items():
            self.active[layer] = frozenset(one for one in experts if ExpertKey(layer, one) not in keys)

    def is_active(self, key: ExpertKey) -> bool:
        """Whether the current batch uses ``key``: the last forward of its layer did, and that is not long ago.

        Not longer than it takes all layers to come once: the encoder's experts are of no use to the decoder's steps.
        """
        in_last_forward = key.expert in self.active.get(key.layer, ())
        return in_last_forward and self.now - self.last_use[key] < len(self.active)

    def until_forward(self, layer: str) -> float:
        """Visits until ``layer`` comes again, if it comes as regularly as the last time; infinite before its second."""
        timing = self._layers.get(layer)
        return math.inf if timing is None else max(timing.last + timing.period - self.now, 0.0)

    def period(self, layer: str) -> float:
        """Visits between the last two forwards of ``layer``; infinite before its second."""
        timing = self._layers.get(layer)
        return math.inf if timing is None else timing.period

    def until_use(self, key: ExpertKey) -> tuple[float, float]:
        """Visits until ``key`` is expected to be used again; beside it its rarity, which decides between infinite ones.

        The layer comes when it comes; an expert that is in one of ``n`` of its forwards then takes ``n - 1`` more.
        """
        timing, frequency = self._layers.get(key.layer), self._frequency.get(key)
        if timing is None or frequency is None:
            return math.inf, math.inf
        rarity = 1.0 / max(frequency.at(timing.forwards), 1e-9)
        return self.until_forward(key.layer) + (rarity - 1.0) * timing.period, rarity


def lifo(history: History, key: ExpertKey) -> Rank:
    """The paper's (section 3.1): first experts that are not active in this batch, then the last one loaded.

    Experts of a layer run in ascending order in every batch, a cyclic scan, in which the last one loaded is the one
    that is needed again latest.
    """
    return (history.is_active(key), -history.loaded.get(key, 0))


def fifo(history: History, key: ExpertKey) -> Rank:
    """The first one loaded."""
    return (history.loaded.get(key, 0),)


def lru(history: History, key: ExpertKey) -> Rank:
    """The one whose last use is longest ago; the first one loaded among equals."""
    return (history.last_use.get(key, 0), history.loaded.get(key, 0))


def lfu(history: History, key: ExpertKey) -> Rank:
    """The one used least often, resident or not; the one used longest ago among equals."""
    return (history.uses.get(key, 0), history.last_use.get(key, 0))


def lfru(history: History, key: ExpertKey) -> Rank:
    """The one with the lowest decayed frequency."""
    return (history.heat.get(key, NEVER),)


def reuse(history: History, key: ExpertKey) -> Rank:
    """The one that is expected to be needed again latest: Belady's rule with an estimate for the future.

    Experts of an encoder layer wait for the next batch, those of the layer that comes next do not wait at all, and
    within a layer it is how often, and how lately, an expert was used.
    """
    visits, rarity = history.until_use(key)
    return (-visits, -rarity)


POLICIES: Mapping[str, Policy] = {
    "reuse": reuse,
    "lfru": lfru,
    "lifo": lifo,
    "fifo": fifo,
    "lru": lru,
    "lfu": lfu,
}
"""The policies a runtime can follow."""

DEFAULT_POLICY = "reuse"

BELADY = "belady"
"""Evicts what is needed again latest; only a simulation knows that."""


def find_policy(name: str) -> Policy:
    """The policy called ``name``; OptionError lists the names there are."""
    try:
        return POLICIES[name]
    except KeyError:
        raise OptionError("eviction", f"{name!r} is not one of {', '.join(POLICIES)}") from None


@dataclass(frozen=True)
class PlannedLoad:
    """One load of a visit: ``key`` takes the place of ``victim``, or a free slot when that is None."""

    key: ExpertKey
    victim: ExpertKey | None


def plan_loads(
    missing: Sequence[ExpertKey],
    free: int,
    idle: Iterable[ExpertKey],
    hits: Iterable[ExpertKey],
    rank: Callable[[ExpertKey], Rank],
    *,
    depth: int,
) -> tuple[PlannedLoad, ...]:
    """Decide what makes room for each of ``missing``, in order.

    First ``free`` slots are taken, then the resident of lowest rank each time. Residents of this very forward can go
    too, once they are computed: ``hits``, which are computed first, and earlier ones of ``missing``; of these, not the
    last ``depth - 1``, so that many loads and computations overlap. A forward that wants more experts than fit thus
    streams through a few slots where the policy holds what is in the others for more valuable.

    Args:
        missing: to load, in the order in which they will be computed.
        free: empty slots.
        idle: residents that no forward is using.
        hits: residents that this forward computes first, and nobody else is using.
        rank: the policy.
        depth: 1 or more; 1 gives the paper's serial order.

    Returns as many loads as there is room for, which may be fewer than ``missing``; a victim in this forward is
    computed before the load that replaces it.
    """
    plan = [PlannedLoad(key, None) for key in missing[:free]]
    if len(plan) == len(missing):
        return tuple(plan)
    # The key itself decides between equals, so that no decision depends on the timing of threads.
    evictable = [(rank(key), key) for key in chain(idle, hits)]
    heapq.heapify(evictable)
    loaded = deque(load.key for load in plan)
    for key in missing[len(plan) :]:
        while loaded and (len(loaded) >= depth or not evictable):
            heapq.heappush(evictable, (rank(loaded[0]), loaded.popleft()))
        if not evictable:
            break
        plan.append(PlannedLoad(key, heapq.heappop(evictable)[1]))
        loaded.append(key)
    return tuple(plan)
