"""The experts of a whole model over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fairseq_moe_opt.parallel.all_reduce import AllReduceExchange
from fairseq_moe_opt.parallel.all_to_all import AllToAllExchange
from fairseq_moe_opt.parallel.collectives import Collectives
from fairseq_moe_opt.parallel.slot_map import SlotMap

ALL_TO_ALL, ALL_REDUCE = "all-to-all", "all-reduce"

EXCHANGES: Mapping[str, type[AllToAllExchange] | type[AllReduceExchange]] = MappingProxyType(
    {ALL_TO_ALL: AllToAllExchange, ALL_REDUCE: AllReduceExchange}
)
"""By name: ranks with batches of their own, and ranks that are all given the same batch."""


@dataclass(frozen=True)
class ExpertSpread:
    """Which of the ranks holds which expert of every layer.

    Attributes:
        ranks: that share the experts.
        slot_maps: by the layer's name.
        kind: of exchange, a name of ``EXCHANGES``.
    """

    ranks: Collectives
    slot_maps: Mapping[str, SlotMap]
    kind: str = ALL_TO_ALL

    def held(self, layer: str) -> tuple[int, ...]:
        """The logical experts of this rank, by slot."""
        return self.slot_maps[layer].by_rank[self.ranks.rank]

    def exchange(self, layer: str) -> AllToAllExchange | AllReduceExchange:
        """The exchange of one layer."""
        return EXCHANGES[self.kind](self.ranks, self.slot_maps[layer])
