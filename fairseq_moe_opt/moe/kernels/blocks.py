"""Rows of all experts as blocks of few rows each, of one expert: the plan that a grouped kernel's programs read.

A block is three numbers: its expert, its first sorted row, and where that expert's rows end. A plan of choices is made
by the device alone: it has as many blocks as any routing of so many choices could need, and those beyond what this
routing needs have expert ``E``. So its shape never depends on the routing, the host never waits for a count, and a CUDA
graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_moe_opt.moe.types import Segment


class ChoicePlan(NamedTuple):
    """Choices sorted by expert, in blocks; all on their device.

    Attributes:
        order: (N,) int64, the choice (token * K + k) that each sorted row is; those not computed are the tail.
        blocks: (3, B) int64: expert, first sorted row, and the end of that expert's sorted rows. Expert E is no block.
        counts: (E,) int64, rows of each expert.
    """

    order: Tensor
    blocks: Tensor
    counts: Tensor


def most_blocks(num_rows: int, num_experts: int, block_rows: int) -> int:
    """Blocks that the worst distribution of ``num_rows`` rows over experts needs.

    Every expert that has rows has one block for its first row, and one more for every ``block_rows`` rows after that.
    """
    begun = min(num_rows, num_experts)
    return begun + (num_rows - begun) // block_rows


def plan_choices(expert_index: Tensor, num_experts: int, block_rows: int) -> ChoicePlan:
    """Plan (T, K) choices, of which ``num_experts`` marks one that is not computed, without asking the device."""
    flat = expert_index.reshape(-1)
    device = flat.device
    ascending, order = torch.sort(flat, stable=True)
    # Where each expert's rows begin, and where those not computed do. Not bincount: on CUDA it waits for the maximum.
    edges = torch.searchsorted(ascending, torch.arange(num_experts + 1, device=device))
    counts = edges.diff()
    needed = (counts + (block_rows - 1)) // block_rows
    after = needed.cumsum(0)
    block = torch.arange(most_blocks(flat.numel(), num_experts, block_rows), device=device)
    expert = torch.searchsorted(after, block, right=True)
    known = expert.clamp_max(num_experts - 1)
    start = edges[known] + (block - (after - needed)[known]) * block_rows
    return ChoicePlan(order, torch.stack((expert, start, edges[known + 1])), counts)


def plan_segments(segments: Sequence[Segment], block_rows: int, device: torch.device) -> Tensor:
    """(3, B) blocks of rows that are sorted already and whose segments the host knows: no block too many."""
    blocks = [
        (segment.expert, start, segment.stop)
        for segment in segments
        for start in range(segment.start, segment.stop, block_rows)
    ]
    return torch.tensor(list(zip(*blocks, strict=True)), dtype=torch.int64, device=device)
