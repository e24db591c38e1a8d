"""The paper's objective solved exactly, for small cases, as a mixed-integer program (scipy's HiGHS)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement.history import Shares
from fairseq_moe_opt.placement.types import Cluster, RankSlots, rank_slots

MAX_VARIABLES = 256
"""Experts times ranks up to which a proof takes seconds rather than hours."""


def place_exact(shares: Shares, cluster: Cluster) -> RankSlots:
    """Minimise ``max |load - 1/W|`` over ranks and batches, without replicas; a proven minimum.

    Raises OptionError beyond ``MAX_VARIABLES`` experts times ranks, or without scipy.
    """
    num_experts, num_ranks = shares.shape[1], cluster.num_ranks
    if num_experts * num_ranks > MAX_VARIABLES:
        size = f"{num_experts} experts times {num_ranks} ranks"
        raise OptionError("strategy", f"'exact' takes up to {MAX_VARIABLES} experts times ranks; got {size}")
    chosen = _solve(shares, cluster)
    return rank_slots(np.arange(num_experts), chosen.argmax(axis=1), num_ranks)


def _solve(shares: Shares, cluster: Cluster) -> NDArray[np.float64]:
    """(E, W) of 0 and 1: the variables are P, row by row, and the distance t to minimise."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise OptionError("strategy", "'exact' needs scipy: pip install scipy") from None
    num_experts, num_ranks = shares.shape[1], cluster.num_ranks
    loads = np.kron(shares, np.eye(num_ranks))
    distance = np.ones((len(loads), 1))
    placed = np.kron(np.eye(num_experts), np.ones(num_ranks))
    held = np.kron(np.ones(num_experts), np.eye(num_ranks))
    none = np.zeros
    constraints = [
        LinearConstraint(np.hstack((placed, none((num_experts, 1)))), 1, 1),
        LinearConstraint(np.hstack((held, none((num_ranks, 1)))), 0, np.array(cluster.slots)),
        LinearConstraint(np.hstack((loads, -distance)), -np.inf, 1 / num_ranks),
        LinearConstraint(np.hstack((loads, distance)), 1 / num_ranks, np.inf),
    ]
    variables = num_experts * num_ranks
    result = milp(
        np.append(np.zeros(variables), 1.0),
        constraints=constraints,
        bounds=Bounds(0, np.append(np.ones(variables), np.inf)),
        integrality=np.append(np.ones(variables), 0),
    )
    return np.asarray(result.x[:-1]).reshape(num_experts, num_ranks)
