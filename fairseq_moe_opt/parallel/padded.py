"""The static baseline's exchange: equal blocks of C rows an expert, full or not (paper section 2.1).

E * C * D numbers each way and rank, where ``all_to_all`` sends those of real rows. It is here to be measured against
and to verify with.
"""

from __future__ import annotations

from torch import Tensor

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.exchange_report import COMBINE, COUNTS, DISPATCH, ExchangeCounters
from fairseq_moe_opt.parallel.all_to_all import refuse_gradients
from fairseq_moe_opt.parallel.collectives import Collectives
from fairseq_moe_opt.parallel.metering import MeteredCollectives


class PaddedAllToAllExchange:
    """Rank r holds experts ``r * E / W`` and following, as in fairseq; W must divide E (OptionError)."""

    def __init__(self, ranks: Collectives, num_experts: int) -> None:
        if num_experts % ranks.size:
            raise OptionError(
                "gating",
                f"'static' sends equal blocks, so {ranks.size} ranks cannot share {num_experts} experts; use 'dynamic'",
            )
        self._num_slots = num_experts // ranks.size
        self._ranks = MeteredCollectives(ranks, ExchangeCounters("padded", ranks.rank, ranks.size, self._num_slots))

    @property
    def num_slots(self) -> int:
        """E_local."""
        return self._num_slots

    @property
    def counters(self) -> ExchangeCounters:
        """Sums of what was sent and received."""
        return self._ranks.counters

    def capacity(self, own: int) -> int:
        """The largest of any rank; the branches agree on the token count in the same way, by an all-reduce."""
        return self._ranks.maximum(COUNTS, own)

    def dispatch(self, buffers: Tensor) -> Tensor:
        """(E, C, D) to (E_local, W * C, D): what came as [source rank][expert] is put as [expert][source rank]."""
        refuse_gradients(buffers)
        _, capacity, width = buffers.shape
        received = self._swap(DISPATCH, buffers)
        by_expert = received.view(self._ranks.size, self._num_slots, capacity, width).transpose(0, 1)
        rows = self._ranks.size * capacity
        self.counters.add_rows((rows,) * self._num_slots)
        return by_expert.reshape(self._num_slots, rows, width)

    def combine(self, outputs: Tensor) -> Tensor:
        """(E_local, W * C, D) back to (E, C, D)."""
        refuse_gradients(outputs)
        num_slots, rows, width = outputs.shape
        by_rank = outputs.view(num_slots, self._ranks.size, rows // self._ranks.size, width).transpose(0, 1)
        return self._swap(COMBINE, by_rank.reshape(num_slots * self._ranks.size, rows // self._ranks.size, width))

    def _swap(self, direction: str, blocks: Tensor) -> Tensor:
        blocks = blocks.contiguous()
        received = blocks.new_empty(blocks.shape)
        self._ranks.all_to_all(direction, received, blocks).wait()
        return received
