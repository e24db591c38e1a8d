"""Which rank holds which expert, as tables; and which rows go where. Pure functions of integers.

Blocks and their orders, drawn once. Two ranks, experts a to c, placement ``(a, c), (b, c)``: c has two replicas. Rows
of a sender are sorted by logical expert, and are sent sorted by rank, then slot::

    rows of rank 0, by expert        a a | b | c c c
    sent, [rank][slot]               a a , c | b , c c      c's rows are split: the first to rank 0, the rest to rank 1

A receiver gets them by source rank, and computes them by slot::

    received by rank 0               a a , c | a , c        [source rank][slot]
    computed                         a a a | c c            [slot][source rank]

Both steps are a permutation of blocks: ``block_order`` makes the index, and the way back is the same index inverted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fairseq_moe_opt.errors import OptionError


@dataclass(frozen=True)
class SlotMap:
    """Where the experts of one layer are.

    Attributes:
        num_experts: E, logical experts.
        by_rank: for every rank the logical experts it holds, in slot order. Ranks may hold different numbers, none
            included, and an expert may be on several ranks (replicas).

    Raises OptionError when an expert is nowhere, unknown, or twice on one rank.
    """

    num_experts: int
    by_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.by_rank):
            unknown = [expert for expert in experts if not 0 <= expert < self.num_experts]
            if unknown:
                raise OptionError(
                    "placement", f"rank {rank} is given expert {unknown[0]}, but a layer has {self.num_experts}"
                )
            if len(set(experts)) < len(experts):
                raise OptionError("placement", f"rank {rank} is given the same expert twice: {list(experts)}")
        nowhere = sorted(set(range(self.num_experts)) - set(self.physical))
        if nowhere:
            raise OptionError("placement", f"no rank holds expert {nowhere[0]}; each must be on at least one")

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> SlotMap:
        """Ascending experts in equal parts, as in fairseq; the first ranks hold one more where it does not divide.

        >>> SlotMap.contiguous(5, 2).by_rank
        ((0, 1, 2), (3, 4))
        """
        share, more = divmod(num_experts, num_ranks)
        starts = [rank * share + min(rank, more) for rank in range(num_ranks + 1)]
        return cls(num_experts, tuple(tuple(range(one, other)) for one, other in pairwise(starts)))

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.by_rank)

    @property
    def physical(self) -> tuple[int, ...]:
        """The logical expert of every slot of every rank, in the order rows are sent in: by rank, then slot."""
        return tuple(expert for experts in self.by_rank for expert in experts)

    @property
    def num_slots(self) -> tuple[int, ...]:
        """Slots of each rank."""
        return tuple(len(experts) for experts in self.by_rank)

    def turns(self, sender: int) -> tuple[tuple[int, int], ...]:
        """For every physical slot, which part of its expert's rows it gets from ``sender``, and of how many parts.

        Senders begin with different replicas, so that lone rows (a decoding step has few) do not all go to the same.
        """
        replicas = Counter(self.physical)
        seen: Counter[int] = Counter()
        turns = []
        for expert in self.physical:
            turns.append(((seen[expert] + sender) % replicas[expert], replicas[expert]))
            seen[expert] += 1
        return tuple(turns)


@dataclass(frozen=True)
class Blocks:
    """Runs of rows: block b is rows ``starts[b] : starts[b] + counts[b]``; both (B,) int64."""

    starts: Tensor
    counts: Tensor


class Shares:
    """The blocks that one sender's rows are cut into."""

    def __init__(self, slot_map: SlotMap, sender: int) -> None:
        turns, parts = zip(*slot_map.turns(sender), strict=True)
        self._num_experts = slot_map.num_experts
        self._tables = torch.tensor((slot_map.physical, turns, parts), dtype=torch.int64)

    def blocks(self, sizes: Tensor) -> Blocks:
        """One block a physical slot, on the device of ``sizes`` (E + ...,), whose first E are the rows of each expert.

        An expert's rows are split evenly: parts differ by one row at most.
        """
        if self._tables.device != sizes.device:
            self._tables = self._tables.to(sizes.device)
        expert, turn, parts = self._tables
        sizes = sizes[: self._num_experts]
        rows = sizes[expert]
        first = rows * turn // parts
        last = rows * (turn + 1) // parts
        return Blocks((torch.cumsum(sizes, 0) - sizes)[expert] + first, last - first)


def by_slot(arrived: Tensor) -> Blocks:
    """Blocks of rows that came as [source rank][slot], in the order [slot][source rank]; ``arrived`` (W, E_local)."""
    flat = arrived.reshape(-1)
    starts = (torch.cumsum(flat, 0) - flat).view_as(arrived)
    return Blocks(starts.t().reshape(-1), arrived.t().reshape(-1))


def block_order(blocks: Blocks, num_rows: int) -> Tensor:
    """(num_rows,) int64: the rows of all blocks one after another; ``num_rows`` is the sum of their counts.

    Knowing it beforehand spares a host synchronisation.
    """
    shift = blocks.starts - (torch.cumsum(blocks.counts, 0) - blocks.counts)
    spread = torch.repeat_interleave(shift, blocks.counts, output_size=num_rows)
    return spread + torch.arange(num_rows, device=spread.device)


def sort_rows(rows: Tensor, order: Tensor | None) -> Tensor:
    """(n, D) rows in ``order`` (n,); None is the order they have."""
    return rows if order is None else rows.index_select(0, order)


def unsort_rows(rows: Tensor, order: Tensor | None, out: Tensor) -> Tensor:
    """The inverse of ``sort_rows``, into ``out`` (n, D)."""
    return out.copy_(rows) if order is None else out.index_copy_(0, order, rows)
