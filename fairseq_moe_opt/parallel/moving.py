"""Experts that change ranks: who sends which to whom, and the sending.

Which experts move follows from two tables that every rank has, so nothing is negotiated. Weights travel as bytes, a
layer at a time, in one uneven all-to-all: bit for bit, whatever their dtypes. What a rank sends and receives of one
layer is in memory twice meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.parallel.collectives import Collectives
from fairseq_moe_opt.parallel.slot_map import SlotMap


@dataclass(frozen=True)
class Transfer:
    """A copy of ``expert`` that rank ``target`` gets from rank ``source``."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class Delivery:
    """The bytes of the experts that came to this rank, by expert, each (expert_bytes,) uint8, and how many it sent."""

    received: dict[int, Tensor]
    bytes_sent: int
    bytes_received: int


def settled(before: SlotMap, after: SlotMap) -> SlotMap:
    """``after``, with the experts that stay on a rank in the slots they have, and newcomers in those that are left.

    So a newcomer takes the memory of one that leaves, and nothing else moves. On a rank that gets fewer experts, the
    last slots end: who is in them comes forward to one that is empty.

    >>> settled(SlotMap(4, ((2, 0), (1, 3))), SlotMap(4, ((0, 1), (2, 3)))).by_rank
    ((1, 0), (2, 3))
    """
    if (before.num_experts, before.num_ranks) != (after.num_experts, after.num_ranks):
        raise OptionError(
            "placement",
            f"is for {after.num_experts} experts on {after.num_ranks} ranks, but the running one is for "
            f"{before.num_experts} on {before.num_ranks}",
        )
    pairs = zip(before.by_rank, after.by_rank, strict=True)
    return SlotMap(after.num_experts, tuple(_settled_rank(held, wanted) for held, wanted in pairs))


def _settled_rank(held: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    places: list[int | None] = [None] * len(wanted)
    for slot, expert in enumerate(held[: len(wanted)]):
        if expert in wanted:
            places[slot] = expert
    rest = iter([expert for expert in wanted if expert not in places])
    return tuple(next(rest) if expert is None else expert for expert in places)


def transfers(before: SlotMap, after: SlotMap) -> tuple[Transfer, ...]:
    """Every copy that a rank of ``after`` holds and the same rank of ``before`` does not, by target, then expert.

    Of several ranks that have an expert, the one that sends least so far sends it, the lowest among equals.
    """
    homes: dict[int, list[int]] = {expert: [] for expert in range(before.num_experts)}
    for rank, experts in enumerate(before.by_rank):
        for expert in experts:
            homes[expert].append(rank)
    sent = [0] * before.num_ranks
    found = []
    for target, experts in enumerate(after.by_rank):
        for expert in sorted(set(experts).difference(before.by_rank[target])):
            source = min(homes[expert], key=lambda rank: (sent[rank], rank))
            sent[source] += 1
            found.append(Transfer(expert, source, target))
    return tuple(found)


def send_experts(
    ranks: Collectives,
    moves: Sequence[Transfer],
    tensors_of: Callable[[int], Sequence[Tensor]],
    expert_bytes: int,
    device: torch.device,
) -> Delivery:
    """Send this rank's part of one layer's ``moves``, and receive what comes; every rank calls it with the same moves.

    Args:
        ranks: that share the experts.
        moves: of ``transfers``.
        tensors_of: the weights of an expert that this rank holds, contiguous.
        expert_bytes: of them together.
        device: of the weights.
    """
    sizes = range(ranks.size)
    outgoing = [[move for move in moves if (move.source, move.target) == (ranks.rank, other)] for other in sizes]
    incoming = [[move for move in moves if (move.target, move.source) == (ranks.rank, other)] for other in sizes]
    leaving, arriving = list(chain.from_iterable(outgoing)), list(chain.from_iterable(incoming))
    sent = torch.empty(len(leaving), expert_bytes, dtype=torch.uint8, device=device)
    received = torch.empty(len(arriving), expert_bytes, dtype=torch.uint8, device=device)
    for row, move in zip(sent, leaving, strict=True):
        _copy_out(tensors_of(move.expert), row)
    ranks.all_to_all(received, sent, list(map(len, incoming)), list(map(len, outgoing))).wait()
    by_expert = {move.expert: row for row, move in zip(received, arriving, strict=True)}
    return Delivery(by_expert, sent.numel(), received.numel())


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copy_in(row: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the bytes of ``row`` into ``tensors``, one after the other."""
    for part, tensor in zip(torch.split(row, [nbytes_of([one]) for one in tensors]), tensors, strict=True):
        _as_bytes(tensor).copy_(part)


def _copy_out(tensors: Sequence[Tensor], row: Tensor) -> None:
    for part, tensor in zip(torch.split(row, [nbytes_of([one]) for one in tensors]), tensors, strict=True):
        part.copy_(_as_bytes(tensor))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
