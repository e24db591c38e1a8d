"""The local search: incremental numbers against plain ones, its conditions, nodes, and the moments it believes in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.placement import Cluster, LoadHistory, evaluate, place, rank_loads, synthetic_history
from fairseq_moe_opt.placement.history import shares_of
from fairseq_moe_opt.placement.moments import believed_second_moment, effective_batches
from fairseq_moe_opt.placement.strategies.eplb import eplb_items
from fairseq_moe_opt.placement.swaps import Assignment, Conditions, Items, descend
from fairseq_moe_opt.placement.types import rank_slots
from tests.helpers.placements import clusters, histories


def drawn(data: st.DataObject) -> tuple[Assignment, Cluster]:
    """EPLB's plan of some history, with its plain second moments."""
    shares = shares_of(data.draw(histories(max_experts=8)))
    cluster = data.draw(clusters(shares.shape[1]))
    experts, ranks = eplb_items(shares.mean(axis=0), cluster)
    return Assignment(Items.of(experts, shares, shares.T @ shares / len(shares)), ranks, cluster), cluster


def plain_cost(assignment: Assignment, num_nodes: int) -> float:
    """Mean over batches of the squared loads of ranks and nodes, from the placement alone."""
    items = assignment.items
    slots = rank_slots(items.expert, assignment.ranks, len(assignment.loads))
    shares = np.zeros((items.shares.shape[1], items.expert.max() + 1))
    np.add.at(shares.T, items.expert, items.shares)
    loads = rank_loads(slots, shares)
    nodes = loads.reshape(len(loads), num_nodes, -1).sum(axis=2)
    return float((loads**2).sum(axis=1).mean() + (num_nodes > 1) * (nodes**2).sum(axis=1).mean())


@given(st.data())
def test_cost_changes_are_what_swaps_do(data: st.DataObject) -> None:
    assignment, cluster = drawn(data)
    for _ in range(3):
        one, other = (data.draw(st.integers(0, len(assignment.ranks) - 1)) for _ in range(2))
        before, predicted = plain_cost(assignment, cluster.num_nodes), assignment.cost_changes(one)[other]
        assert assignment.cost() == pytest.approx(before)
        if assignment.ranks[one] != assignment.ranks[other]:
            assignment.swap(one, other)
        assert plain_cost(assignment, cluster.num_nodes) == pytest.approx(before + predicted)


@given(st.data())
def test_the_search_lowers_the_cost_within_the_conditions(data: st.DataObject) -> None:
    assignment, _ = drawn(data)
    conditions = Conditions.no_worse_than(assignment.loads, 4.0)
    before = assignment.cost()
    descend(assignment, conditions)
    assert assignment.cost() <= before + 1e-12
    assert assignment.loads.max() <= conditions.high + 1e-9
    assert assignment.loads.min() >= conditions.low - 1e-9


def test_co_active_experts_are_parted() -> None:
    # By the means alone any two pairs are alike; the second moments tell 0, 2 and 1, 3 apart.
    counts = np.array([[4, 0, 4, 0], [0, 4, 0, 4]] * 8)
    layers = place(LoadHistory({"a": counts}), Cluster((2, 2)), "balanced").layers
    assert not {frozenset(rank) for rank in layers["a"]} & {frozenset((0, 2)), frozenset((1, 3))}


def test_no_swap_for_a_gain_within_its_error() -> None:
    # Swapping 1 and 3 would even out batch 0 and make batch 1 as uneven: nothing is gained that another history keeps.
    shares = np.array([[0.4, 0.3, 0.1, 0.2], [0.1, 0.2, 0.4, 0.3], [0.4, 0.2, 0.1, 0.3]])
    start = np.array([0, 0, 1, 1])

    def swapped(effective: float) -> bool:
        assignment = Assignment(Items.of(np.arange(4), shares, shares.T @ shares / 3), start, Cluster((2, 2)))
        descend(assignment, Conditions(0.0, 1.0, effective))
        return assignment.ranks.tolist() != start.tolist()

    assert swapped(1000.0)
    assert not swapped(0.01)


def test_nodes_are_balanced_too() -> None:
    """Without the nodes' term the ranks alone decide, and two hot ranks may share a node."""
    history = synthetic_history("lm", 64, 64, 4, 5)

    def worst_node(num_nodes: int) -> float:
        placement = place(history, Cluster.even(8, 64, num_nodes=num_nodes))
        loads = [rank_loads(placement.layers[name], history.shares(name)) for name in history.layers]
        return float(np.mean([one.reshape(len(one), 2, 4).sum(axis=2).max(axis=1).mean() for one in loads]))

    assert worst_node(2) < worst_node(1)


def test_few_batches_prove_no_correlation() -> None:
    rng = np.random.default_rng(3)
    shares = shares_of(rng.integers(1, 9, (40, 10)))
    mean, spread = shares.mean(axis=0), shares.std(axis=0)
    believed = (believed_second_moment(shares) - np.outer(mean, mean)) / np.outer(spread, spread)
    plain = np.corrcoef(shares.T)
    off = ~np.eye(10, dtype=bool)
    np.testing.assert_allclose(np.diag(believed), 1.0)
    assert (np.abs(believed[off]) < np.abs(plain[off]) + 1e-12).all()
    error = 1 / np.sqrt(effective_batches(shares))
    assert (np.abs(believed[np.abs(plain) < error - 1e-9]) < 1e-9).all()
    np.testing.assert_allclose(np.abs(believed[off]), np.maximum(np.abs(plain[off]) - error, 0), atol=1e-9)


def test_sticky_batches_count_for_less() -> None:
    rng = np.random.default_rng(4)
    independent = rng.random((200, 6))
    sticky = np.repeat(rng.random((20, 6)), 10, axis=0)
    assert effective_batches(independent) == 200
    assert 15 < effective_batches(sticky) < 40
    assert effective_batches(np.ones((5, 3))) == 5
    assert effective_batches(np.ones((1, 3))) == 1


def test_spare_slots_lower_the_load_of_a_hot_expert() -> None:
    history = LoadHistory({"a": np.array([[8, 2, 2, 2], [8, 2, 2, 2]])})
    without = evaluate(place(history, Cluster.even(2, 4)), history)["a"]
    within = evaluate(place(history, Cluster.even(2, 4, spare_slots=2)), history)["a"]
    assert (without.avg_max_load, within.avg_max_load) == pytest.approx((10 / 14, 0.5))
