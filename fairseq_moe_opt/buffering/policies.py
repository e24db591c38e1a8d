"""Which resident expert makes room for another: pure functions, the same in the runtime and in the simulator.

A policy ranks experts by what is known of their past; the lowest rank goes first. All of them keep what the current
forward of a layer needs until nothing else can go (``plan_loads`` sees to it), and none ever sees an expert that the
current forward has still to compute.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.types import ExpertKey

Rank = tuple[float, ...]
Policy = Callable[["History", ExpertKey], Rank]

NEVER = -math.inf


@dataclass
class History:
    """What was asked for and loaded so far. Time counts visits: forwards of any layer.

    Attributes:
        half_life: visits after which a use counts half in ``heat``.
        now: visits so far.
        active: the last set that each layer asked for.
        last_use: the visit of an expert's last use.
        uses: how often it was asked for.
        heat: log2 of its uses, each halved every ``half_life`` visits, plus ``now / half_life`` at its last use, which
            orders experts by their decayed frequency at any later time.
        loaded: the number of its last load, counted over all loads.
    """

    half_life: float = 64.0
    now: int = 0
    active: dict[str, frozenset[int]] = field(default_factory=dict)
    last_use: dict[ExpertKey, int] = field(default_factory=dict)
    uses: dict[ExpertKey, int] = field(default_factory=dict)
    heat: dict[ExpertKey, float] = field(default_factory=dict)
    loaded: dict[ExpertKey, int] = field(default_factory=dict)
    _loads: int = 0

    def note_visit(self, layer: str, needed: Sequence[int]) -> None:
        """A forward of ``layer`` asked for the experts ``needed``."""
        self.now += 1
        self.active[layer] = frozenset(needed)
        now_log = self.now / self.half_life
        for expert in needed:
            key = ExpertKey(layer, expert)
            self.last_use[key] = self.now
            self.uses[key] = self.uses.get(key, 0) + 1
            before = self.heat.get(key, NEVER)
            self.heat[key] = now_log + math.log2(1.0 + 2.0 ** (before - now_log))

    def note_load(self, key: ExpertKey) -> None:
        """A load of ``key`` was decided."""
        self._loads += 1
        self.loaded[key] = self._loads

    def is_active(self, key: ExpertKey) -> bool:
        """Whether the last forward of its layer asked for ``key``."""
        return key.expert in self.active.get(key.layer, ())


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
    """The one with the lowest decayed frequency, experts not active in this batch before active ones."""
    return (history.is_active(key), history.heat.get(key, NEVER))


POLICIES: Mapping[str, Policy] = {"lifo": lifo, "fifo": fifo, "lru": lru, "lfu": lfu, "lfru": lfru}
"""The policies a runtime can follow."""

DEFAULT_POLICY = "lfru"

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
    hits: Collection[ExpertKey],
    rank: Callable[[ExpertKey], Rank],
    *,
    depth: int,
    clairvoyant: bool = False,
) -> tuple[PlannedLoad, ...]:
    """Decide what makes room for each of ``missing``, in order.

    First ``free`` slots are taken, then the ``idle`` residents of lowest rank. Only then experts of this very forward
    go, after they were computed: ``hits``, which are computed first, and earlier ones of ``missing``; of these, not the
    last ``depth - 1``, so that many loads and computations overlap.

    Args:
        missing: to load, in the order in which they will be computed.
        free: empty slots.
        idle: residents that no forward is using.
        hits: residents that this forward computes first, and nobody else is using.
        rank: the policy.
        depth: 1 or more; 1 gives the paper's serial order.
        clairvoyant: rank ``hits`` together with ``idle``, for a policy that knows the future.

    Returns as many loads as there is room for, which may be fewer than ``missing``; victims in this forward are
    computed before the load that replaces them.
    """
    plan = [PlannedLoad(key, None) for key in missing[:free]]
    first = [*idle, *hits] if clairvoyant else idle
    # The key itself decides between equals, so that no decision depends on the timing of threads.
    victims = heapq.nsmallest(len(missing) - len(plan), first, key=lambda key: (rank(key), key))
    plan += [PlannedLoad(key, victim) for key, victim in zip(missing[len(plan) :], victims, strict=False)]
    if len(plan) < len(missing):
        plan = _reuse(missing, plan, () if clairvoyant else hits, rank, depth)
    return tuple(plan)


def _reuse(
    missing: Sequence[ExpertKey],
    plan: list[PlannedLoad],
    hits: Collection[ExpertKey],
    rank: Callable[[ExpertKey], Rank],
    depth: int,
) -> list[PlannedLoad]:
    """Go on with ``plan`` by evicting what this forward itself has computed by then."""
    computed = [(rank(key), key) for key in hits]
    heapq.heapify(computed)
    loaded = deque(load.key for load in plan)
    for key in missing[len(plan) :]:
        while len(loaded) >= depth:
            heapq.heappush(computed, (rank(loaded[0]), loaded.popleft()))
        if not computed and loaded:
            heapq.heappush(computed, (rank(loaded[0]), loaded.popleft()))
        if not computed:
            break
        plan.append(PlannedLoad(key, heapq.heappop(computed)[1]))
        loaded.append(key)
    return plan
