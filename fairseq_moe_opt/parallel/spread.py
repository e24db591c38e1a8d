"""The experts of a whole model over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fairseq_moe_opt.parallel.all_reduce import AllReduceExchange
from fairseq_moe_opt.parallel.all_to_all import AllToAllExchange
from fairseq_moe_opt.parallel.collectives import Collectives
from fairseq_moe_opt.parallel.slot_map import SlotMap


@dataclass(frozen=True)
class ExpertSpread:
    """Which of the ranks holds which expert of every layer.

    Attributes:
        ranks: that share the experts.
        slot_maps: by the layer's name.
        same_batch: whether all ranks have the same tokens, instead of each its own.
    """

    ranks: Collectives
    slot_maps: Mapping[str, SlotMap]
    same_batch: bool = False

    def held(self, layer: str) -> tuple[int, ...]:
        """The logical experts of this rank, by slot."""
        return self.slot_maps[layer].by_rank[self.ranks.rank]

    def exchange(self, layer: str) -> AllToAllExchange | AllReduceExchange:
        """The layer's way to the experts of other ranks."""
        kind = AllReduceExchange if self.same_batch else AllToAllExchange
        return kind(self.ranks, self.slot_maps[layer])
