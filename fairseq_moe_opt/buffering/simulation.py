"""What a policy would have done: the runtime's own decisions over a recorded sequence of forwards, without weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fairseq_moe_opt.buffering.policies import BELADY, History, PlannedLoad, Policy, Rank, find_policy, plan_loads
from fairseq_moe_opt.moe.trace import TraceVisit
from fairseq_moe_opt.moe.types import ExpertKey


@dataclass
class SimulatedLayer:
    """Hits and misses of one layer."""

    hits: int = 0
    misses: int = 0

    @property
    def miss_rate(self) -> float:
        """Misses over everything asked for; 0 when nothing was."""
        total = self.hits + self.misses
        return self.misses / total if total else 0.0


def simulate(
    visits: Sequence[TraceVisit],
    slots: Mapping[str, int] | int,
    policy: str,
    *,
    depth: int = 4,
) -> dict[str, SimulatedLayer]:
    """Hits and misses by layer, starting with empty slots.

    Args:
        visits: forwards in order, the experts of each ascending.
        slots: of one pool for all layers, or of each layer's own by its name.
        policy: a runtime policy's name, or ``belady``.
        depth: as in the runtime's pool.

    The same numbers as the runtime counts for the same forwards from one thread, without prefetch.
    """
    names = list(dict.fromkeys(visit.layer for visit in visits))
    groups = {name: _Group(slots) for name in names[:1]} if isinstance(slots, int) else {}
    for name in names:
        groups[name] = groups[names[0]] if isinstance(slots, int) else _Group(slots[name])
    rule: Policy = _Belady(visits) if policy == BELADY else find_policy(policy)
    history, found = History(), {name: SimulatedLayer() for name in names}
    for visit in visits:
        history.note_visit(visit.layer, visit.experts)
        hits, misses = groups[visit.layer].visit(visit, history, rule, depth)
        found[visit.layer].hits += hits
        found[visit.layer].misses += misses
    return found


@dataclass
class _Group:
    """Slots that compete for the same memory."""

    slots: int
    resident: set[ExpertKey] = field(default_factory=set)

    def visit(self, visit: TraceVisit, history: History, policy: Policy, depth: int) -> tuple[int, int]:
        """Take one forward; returns its hits and misses."""
        keys = [ExpertKey(visit.layer, expert) for expert in visit.experts]
        hits = [key for key in keys if key in self.resident]
        missing = [key for key in keys if key not in self.resident]
        clairvoyant = isinstance(policy, _Belady)
        if clairvoyant:
            # What is needed again latest comes first and goes first; a runtime's pipeline would only be in the way.
            missing.sort(key=lambda key: policy(history, key))
        for key in missing:
            history.note_load(key)
        plan = plan_loads(
            missing,
            self.slots - len(self.resident),
            self.resident.difference(hits),
            hits,
            lambda key: policy(history, key),
            depth=1 if clairvoyant else depth,
        )
        self._follow(plan)
        return len(hits), len(missing)

    def _follow(self, plan: Sequence[PlannedLoad]) -> None:
        for load in plan:
            if load.victim is not None:
                self.resident.discard(load.victim)
            self.resident.add(load.key)


class _Belady:
    """Evicts what is needed again latest, or never (Belady's MIN over the visits of one trace)."""

    def __init__(self, visits: Sequence[TraceVisit]) -> None:
        self._uses: dict[ExpertKey, list[int]] = {}
        for now, visit in enumerate(visits, start=1):
            for expert in visit.experts:
                self._uses.setdefault(ExpertKey(visit.layer, expert), []).append(now)
        for uses in self._uses.values():
            uses.reverse()

    def __call__(self, history: History, key: ExpertKey) -> Rank:
        uses = self._uses.get(key, [])
        while uses and uses[-1] <= history.now:
            uses.pop()
        return (-uses[-1] if uses else -math.inf,)
