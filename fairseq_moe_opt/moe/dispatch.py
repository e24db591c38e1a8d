"""Routing to grouped rows and back: one stable sort, counts, a gather and a weighted sum.

Order of the sorted rows: by expert, and within an expert by token (then by choice)::

    choices (t, k):  (0,0)=e2  (0,1)=e0  (1,0)=e0  (1,1)=E(dropped)
    sorted rows:     e0: (0,1) (1,0)   e2: (0,0)   tail, not computed: (1,1)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fairseq_moe_opt.moe.types import Dispatch, Routing, Segment, SortedChoices


def sort(routing: Routing) -> SortedChoices:
    """Group the choices of ``routing`` by expert, all on their device."""
    num_tokens, top_k = routing.expert_index.shape
    flat = routing.expert_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    sizes = torch.bincount(flat, minlength=routing.num_experts + 1)
    if routing.dropped is not None:
        sizes = torch.cat((sizes, routing.dropped.view(1)))
    position = torch.empty_like(flat)
    position[order] = torch.arange(flat.numel(), device=flat.device)
    return SortedChoices(order // top_k, position.view(num_tokens, top_k), sizes)


def settle(choices: SortedChoices, sizes: Sequence[int], num_experts: int) -> Dispatch:
    """The plan, once ``choices.sizes`` are on the host."""
    counts = tuple(sizes[:num_experts])
    num_rows = sum(counts)
    dropped = sizes[num_experts + 1] if len(sizes) > num_experts + 1 else 0
    return Dispatch(choices.source[:num_rows], choices.position.clamp_max(num_rows), counts, dropped)


def plan(routing: Routing) -> Dispatch:
    """Both steps in one, for work that goes nowhere. One host synchronisation: the copy of the sizes."""
    choices = sort(routing)
    return settle(choices, choices.sizes.tolist(), routing.num_experts)


def segments(counts: Sequence[int]) -> tuple[Segment, ...]:
    """The non-empty runs of rows of which the first ``counts[0]`` are expert 0's, and so on."""
    return tuple(
        Segment(expert, stop - count, stop)
        for expert, (count, stop) in enumerate(zip(counts, accumulate(counts), strict=True))
        if count
    )


def gather(tokens: Tensor, source: Tensor, num_rows: int | None = None) -> Tensor:
    """(T, D) tokens to rows, those that ``source`` names: the first ``num_rows`` of them, or all."""
    return tokens.index_select(0, source[:num_rows])


def combine(rows: Tensor, dispatch: Dispatch, weight: Tensor) -> Tensor:
    """(R + 1, D) expert outputs, the last row zero, to (T, D): each token's K rows times ``weight`` (T, K), summed.

    The sum runs over a token's choices in their order, so it does not depend on other tokens, on the kernel's order or
    on where experts were computed. Choices not computed read the zero row.
    """
    weight = weight.to(rows.dtype)
    total = rows.index_select(0, dispatch.position[:, 0]) * weight[:, :1]
    for choice in range(1, weight.shape[1]):
        chosen = rows.index_select(0, dispatch.position[:, choice])
        total = torch.addcmul(total, chosen, weight[:, choice : choice + 1])
    return total
