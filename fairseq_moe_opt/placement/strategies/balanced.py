"""The project's own strategy: the paper's objective in the mean square, within the limits of EPLB's plan."""

from __future__ import annotations

from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.moments import believed_second_moment, effective_batches
from fairseq_moe_opt.placement.strategies.eplb import eplb_items
from fairseq_moe_opt.placement.swaps import Assignment, Conditions, Items, descend
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots


def place_balanced(shares: Shares, cluster: Cluster) -> RankSlots:
    """Start from EPLB's plan, replicas included, and swap while the expected squared load of ranks falls.

    The paper minimises the largest ``|load - 1/W|`` over ranks and batches. One batch of the history decides that,
    so fitting it says little of the next batch. Throughput follows Avg Max Load, but a maximum over ranks is flat
    almost everywhere: most swaps do not change it. The sum over ranks of E[(load - 1/W)^2] bounds the square of its
    excess over 1/W, has a slope everywhere, and needs only second moments, so a swap costs O(E) to try. Since loads
    sum to 1 it orders placements as the sum of E[load^2] does, in which co-active experts on one rank are dear by how
    hot they are: the paper's anti-correlation, with its weights derived. So as not to fit accidents of the history, the
    moments are those of ``believed_second_moment``, and a swap must gain a part of its own standard error.

    Of the paper's own objective, and of Max Load, the result is never worse than EPLB's at equal memory, on the history
    it is placed by: a swap that would break that is not made. With several nodes, the expected squared load of
    nodes counts too: a node's load is what its link to the others has to carry.
    """
    experts, ranks = eplb_items(shares.mean(axis=0), cluster)
    items = Items.of(experts, shares, believed_second_moment(shares))
    assignment = Assignment(items, ranks, cluster)
    descend(assignment, Conditions.no_worse_than(assignment.loads, effective_batches(shares)))
    return rank_slots(experts, assignment.ranks, cluster.num_ranks)
