"""The exchange of ranks that share their batch: each computes its own experts' rows, and all learn every result.

For decoding, where a batch is small and latency is all: one collective a layer instead of three, and no sizes to
exchange, since every rank routes alike. Results are put at their place among N zero rows and summed over ranks: every
number has one addend that is not zero, so the sum is exact whatever its order, and the weighted sum over a token's
choices runs as on one rank. Summing each rank's weighted part instead would move K times fewer bytes, but in an order
that depends on the placement: another rank count, other tokens where two logits are close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_opt.moe.exchange_report import COMBINE, ExchangeCounters
from fairseq_moe_opt.moe.types import Arrival
from fairseq_moe_opt.parallel.all_to_all import check_ranks, refuse_gradients
from fairseq_moe_opt.parallel.collectives import Collectives
from fairseq_moe_opt.parallel.metering import MeteredCollectives
from fairseq_moe_opt.parallel.slot_map import Blocks, Shares, SlotMap, block_order, unsort_rows


@dataclass(frozen=True)
class OwnRows:
    """Which of the ``num_rows`` rows, all ranks' alike, this rank computes: ``index`` (R,)."""

    index: Tensor
    num_rows: int


class AllReduceExchange:
    """All ranks have the same tokens, and route them alike; results equal one rank's bit for bit without replicas.

    Routing alike takes the same kernels on the same kind of device, which ``agree`` and ``follow_first`` see to: a row
    that two ranks route differently would be computed twice, or not at all.
    Rows of a replicated expert are split among its replicas, which may change their last bits (1e-5 relative).
    """

    def __init__(self, ranks: Collectives, slot_map: SlotMap) -> None:
        check_ranks(ranks, slot_map)
        self._num_experts = slot_map.num_experts
        before = sum(slot_map.num_slots[: ranks.rank])
        self._own = slice(before, before + slot_map.num_slots[ranks.rank])
        # The same sender everywhere: ranks that share a batch must cut it alike.
        self._shares = Shares(slot_map, sender=0)
        self._ranks = MeteredCollectives(
            ranks, ExchangeCounters("all-reduce", ranks.rank, ranks.size, slot_map.num_slots[ranks.rank])
        )

    @property
    def num_slots(self) -> int:
        """E_local."""
        return self._own.stop - self._own.start

    @property
    def counters(self) -> ExchangeCounters:
        """Sums of what was sent and received."""
        return self._ranks.counters

    def dispatch(self, sizes: Tensor, gather: Callable[[int | None], Tensor]) -> Arrival:
        """Pick this rank's rows; nothing is sent. See ``TokenExchange``."""
        blocks = self._shares.blocks(sizes)
        own = Blocks(blocks.starts[self._own], blocks.counts[self._own])
        # The layer's one host synchronisation: rows of each expert, and of each local slot.
        on_host = tuple(torch.cat((sizes, own.counts)).tolist())
        own_sizes, counts = on_host[: sizes.numel()], on_host[sizes.numel() :]
        num_rows = sum(own_sizes[: self._num_experts])
        index = block_order(own, sum(counts))
        rows = gather(num_rows)
        refuse_gradients(rows)
        self.counters.add_rows(counts)
        return Arrival(rows.index_select(0, index), counts, own_sizes, OwnRows(index, num_rows))

    def combine(self, results: Tensor, state: object) -> Tensor:
        """Put every rank's results together; see ``TokenExchange``."""
        if not isinstance(state, OwnRows):
            raise TypeError(f"the state of another exchange: {type(state).__name__}")
        refuse_gradients(results)
        combined = results.new_zeros(state.num_rows + 1, results.shape[1])
        unsort_rows(results[:-1], state.index, combined)
        self._ranks.add_up(COMBINE, combined[:-1])
        return combined
