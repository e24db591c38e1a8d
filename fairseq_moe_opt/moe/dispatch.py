"""Routing to grouped rows and back: one stable sort, counts, a gather and a weighted sum.

Order of the sorted rows: by expert, and within an expert by token (then by choice)::

    choices (t, k):  (0,0)=e2  (0,1)=e0  (1,0)=e0  (1,1)=E(dropped)
    sorted rows:     e0: (0,1) (1,0)   e2: (0,0)   tail, not computed: (1,1)
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from fairseq_moe_opt.moe.types import Dispatch, Routing, Segment


def plan(routing: Routing) -> Dispatch:
    """Group the choices of ``routing`` by expert. One host synchronisation: the copy of the E counts."""
    num_tokens, top_k = routing.expert_index.shape
    flat = routing.expert_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    sizes = torch.bincount(flat, minlength=routing.num_experts + 1)
    if routing.dropped is not None:
        sizes = torch.cat((sizes, routing.dropped.view(1)))
    # The layer's one host synchronisation: sizes must be known on the host to slice rows.
    on_host = sizes.tolist()
    counts = tuple(on_host[: routing.num_experts])
    dropped = 0 if routing.dropped is None else on_host[-1]
    num_rows = sum(counts)
    position = torch.empty_like(flat)
    position[order] = torch.arange(flat.numel(), device=flat.device)
    position = position.clamp_max_(num_rows).view(num_tokens, top_k)
    return Dispatch(order[:num_rows] // top_k, position, counts, dropped)


def segments(dispatch: Dispatch) -> tuple[Segment, ...]:
    """The non-empty runs of sorted rows, in ascending expert order."""
    stops = accumulate(dispatch.counts)
    return tuple(
        Segment(expert, stop - count, stop)
        for expert, (count, stop) in enumerate(zip(dispatch.counts, stops, strict=True))
        if count
    )


def gather(tokens: Tensor, dispatch: Dispatch) -> Tensor:
    """(T, D) tokens to (R, D) rows sorted by expert."""
    return tokens.index_select(0, dispatch.source)


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
