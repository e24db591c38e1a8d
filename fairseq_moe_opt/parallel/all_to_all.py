"""Rows to the ranks that hold their experts, by uneven all-to-all: the paper's two steps (section 2.2, steps 3 to 8).

Sizes travel first, while rows are gathered; then the rows themselves, no placeholder among them. Ranks may have
different numbers of tokens, none included. The result equals one process that has all ranks' tokens, in rank order,
to rounding; bit for bit where no expert has replicas, since each expert then computes the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fairseq_moe_opt.errors import OptionError, ParallelError
from fairseq_moe_opt.moe.exchange_report import COMBINE, COUNTS, DISPATCH, ExchangeCounters
from fairseq_moe_opt.moe.types import Arrival
from fairseq_moe_opt.parallel.collectives import Collectives, Pending
from fairseq_moe_opt.parallel.metering import MeteredCollectives
from fairseq_moe_opt.parallel.slot_map import (
    Blocks,
    Shares,
    SlotMap,
    block_order,
    by_slot,
    sort_rows,
    unsort_rows,
)


@dataclass(frozen=True)
class Route:
    """The way rows went, for their results to go back.

    Attributes:
        sent_splits, received_splits: rows to and from each rank.
        outward: (n,) the order in which this rank's rows are sent; None for the order they have.
        inward: (R,) the order in which received rows are computed; None for the order they have.
    """

    sent_splits: tuple[int, ...]
    received_splits: tuple[int, ...]
    outward: Tensor | None
    inward: Tensor | None


class AllToAllExchange:
    """Each rank has tokens of its own; each row goes to a rank that holds its expert, and its result comes back.

    For inference: no gradient flows between ranks, and one that is wanted is refused (ParallelError).
    """

    def __init__(self, ranks: Collectives, slot_map: SlotMap) -> None:
        check_ranks(ranks, slot_map)
        counters = ExchangeCounters("all-to-all", ranks.rank, ranks.size, slot_map.num_slots[ranks.rank])
        self._ranks = MeteredCollectives(ranks, counters)
        self._slots = slot_map.num_slots
        self._is_sorted = slot_map.physical == tuple(range(slot_map.num_experts))
        self._shares = Shares(slot_map, ranks.rank)

    def follow(self, slot_map: SlotMap) -> None:
        """Send rows as ``slot_map`` says from now on: experts have moved. All ranks do so between the same forwards."""
        check_ranks(self._ranks, slot_map)
        self._slots = slot_map.num_slots
        self._is_sorted = slot_map.physical == tuple(range(slot_map.num_experts))
        self._shares = Shares(slot_map, self._ranks.rank)
        self.counters.have_slots(self.num_slots)

    @property
    def num_slots(self) -> int:
        """E_local."""
        return self._slots[self._ranks.rank]

    @property
    def counters(self) -> ExchangeCounters:
        """Sums of what was sent and received."""
        return self._ranks.counters

    def dispatch(self, sizes: Tensor, gather: Callable[[int | None], Tensor]) -> Arrival:
        """Send rows to their experts; see ``TokenExchange``."""
        blocks = self._shares.blocks(sizes)
        arrived, counts_pending = self._send_counts(blocks.counts)
        rows = gather(None)  # while the counts travel
        refuse_gradients(rows)
        counts_pending.wait()
        # The layer's one host synchronisation: rows of each expert, to each slot of each rank, and from each rank.
        on_host = torch.cat((sizes, blocks.counts, arrived)).tolist()
        own, sent, received = _cut(on_host, (sizes.numel(), blocks.counts.numel(), arrived.numel()))
        counts = tuple(sum(received[slot :: self.num_slots]) for slot in range(self.num_slots))
        route = self._route(blocks, arrived, sent, received)
        self.counters.add_rows(counts)
        return Arrival(self._send(rows[: sum(sent)], route), counts, own, route)

    def combine(self, results: Tensor, state: object) -> Tensor:
        """Send results back; see ``TokenExchange``."""
        if not isinstance(state, Route):
            raise TypeError(f"the state of another exchange: {type(state).__name__}")
        refuse_gradients(results)
        computed = results[:-1]
        if state.inward is not None:
            computed = unsort_rows(computed, state.inward, torch.empty_like(computed))
        returned = results.new_empty(sum(state.sent_splits) + 1, results.shape[1])
        returned[-1] = 0
        landing = returned[:-1] if state.outward is None else torch.empty_like(returned[:-1])
        self._ranks.all_to_all(COMBINE, landing, computed, state.sent_splits, state.received_splits).wait()
        if state.outward is not None:
            unsort_rows(landing, state.outward, returned[:-1])
        return returned

    def _send_counts(self, counts: Tensor) -> tuple[Tensor, Pending]:
        """Start telling each rank how many rows each of its slots gets; what comes is (W * E_local,)."""
        arrived = counts.new_empty(self._ranks.size * self.num_slots)
        splits = [self.num_slots] * self._ranks.size
        return arrived, self._ranks.all_to_all(COUNTS, arrived, counts, splits, self._slots)

    def _route(self, blocks: Blocks, arrived: Tensor, sent: Sequence[int], received: Sequence[int]) -> Route:
        """Splits and both permutations; ``sent`` and ``received`` are ``blocks.counts`` and ``arrived`` on the host."""
        matrix = arrived.view(self._ranks.size, self.num_slots)
        sent_splits = tuple(sum(part) for part in _cut(sent, self._slots))
        received_splits = tuple(sum(part) for part in _cut(received, [self.num_slots] * self._ranks.size))
        outward = None if self._is_sorted else block_order(blocks, sum(sent_splits))
        inward = None if self.num_slots <= 1 else block_order(by_slot(matrix), sum(received_splits))
        return Route(sent_splits, received_splits, outward, inward)

    def _send(self, rows: Tensor, route: Route) -> Tensor:
        """(n, D) rows sorted by logical expert to (R, D) rows sorted by local slot."""
        received = rows.new_empty(sum(route.received_splits), rows.shape[1])
        sent = sort_rows(rows, route.outward)
        self._ranks.all_to_all(DISPATCH, received, sent, route.received_splits, route.sent_splits).wait()
        return sort_rows(received, route.inward)


def check_ranks(ranks: Collectives | MeteredCollectives, slot_map: SlotMap) -> None:
    """Raise OptionError unless ``slot_map`` is for as many ranks as there are."""
    if slot_map.num_ranks != ranks.size:
        raise OptionError("placement", f"is for {slot_map.num_ranks} ranks, but {ranks.size} share the experts")


def refuse_gradients(rows: Tensor) -> None:
    """Raise ParallelError when a gradient is wanted through ``rows``."""
    if rows.requires_grad:
        raise ParallelError("gradients do not flow between ranks: run under torch.no_grad(), or on one rank")


def _cut(values: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """``values`` in parts of these lengths."""
    stops = accumulate(lengths)
    return [tuple(values[stop - length : stop]) for length, stop in zip(lengths, stops, strict=True)]
