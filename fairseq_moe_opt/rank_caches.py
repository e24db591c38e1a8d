"""What a placement does to the caches of ranks: each rank has slots for its own experts alone (paper, section 3.3).

Experts that are active together compete for the slots of the rank they are on, so a placement that keeps them apart
lowers the misses of the worst rank, and everybody waits for that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fairseq_moe_opt.buffering import SimulatedLayer, simulate
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.trace import TraceVisit
from fairseq_moe_opt.placement import Placement


@dataclass(frozen=True)
class RankCaches:
    """Hits and misses of every rank, all layers together; ``ranks`` in order."""

    ranks: tuple[SimulatedLayer, ...]

    @property
    def worst(self) -> float:
        """The largest miss rate of a rank."""
        return max(rank.miss_rate for rank in self.ranks)

    @cached_property
    def overall(self) -> float:
        """Misses of all ranks over everything they were asked for."""
        return SimulatedLayer(sum(one.hits for one in self.ranks), sum(one.misses for one in self.ranks)).miss_rate


def simulate_ranks(visits: Sequence[TraceVisit], placement: Placement, slots: int, policy: str) -> RankCaches:
    """Take ``visits`` with caches of ``slots`` experts for each layer and rank, empty at first.

    Args:
        visits: forwards in order, of layers that are in ``placement``, with counts.
        placement: which rank has which experts. Replicas share an expert's rows as even as can be, the first of them
            getting the odd ones, so with fewer rows than replicas the last ones are not asked.
        slots: experts that a rank's cache of one layer holds.
        policy: a runtime policy's name, or ``belady``.

    Raises OptionError for no slot, or a policy that does not exist.
    """
    if slots < 1:
        raise OptionError("slots", f"must be 1 or more; got {slots}")
    sizes = {visit.layer: slots for visit in visits}
    ranks = (simulate(tuple(_on_rank(visits, placement, rank)), sizes, policy) for rank in range(placement.num_ranks))
    return RankCaches(tuple(_together(layers) for layers in ranks))


def _on_rank(visits: Sequence[TraceVisit], placement: Placement, rank: int) -> Iterator[TraceVisit]:
    """The part of each visit that ``rank`` computes; visits it has no part in are left out."""
    turns = {name: _turns(placement, name, rank) for name in placement.layers}
    for visit in visits:
        turn = turns[visit.layer]
        pairs = zip(visit.experts, visit.counts, strict=True)
        mine = tuple(expert for expert, rows in pairs if expert in turn and rows > turn[expert])
        if mine:
            yield TraceVisit(visit.layer, mine)


def _turns(placement: Placement, layer: str, rank: int) -> Mapping[int, int]:
    """The experts that ``rank`` holds of ``layer``, and how many ranks before it hold each of them too."""
    homes = placement.homes[layer]
    return {expert: [home for home, _ in homes[expert]].index(rank) for expert in placement.layers[layer][rank]}


def _together(layers: Mapping[str, SimulatedLayer]) -> SimulatedLayer:
    return SimulatedLayer(sum(one.hits for one in layers.values()), sum(one.misses for one in layers.values()))
