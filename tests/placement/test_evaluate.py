"""Metrics, bytes and bounds: by hand, against plain loops, and bounds against every placement of a few experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.errors import PlacementError
from fairseq_moe_opt.placement import (
    Cluster,
    LayerBalance,
    LoadHistory,
    LowerBounds,
    NetworkBytes,
    Placement,
    evaluate,
    layer_balance,
    lower_bounds,
    network_bytes,
    rank_loads,
)
from fairseq_moe_opt.placement.history import shares_of
from fairseq_moe_opt.placement.strategies import place
from tests.helpers.placements import clusters, histories, naive_loads, partitions

# Two batches of eight rows over four experts; ranks (0, 1) and (2, 3) get 5, 3 rows and then 2, 6.
COUNTS = np.array([[4, 1, 2, 1], [1, 1, 6, 0]])
SLOTS = ((0, 1), (2, 3))


def test_metrics_by_hand() -> None:
    expected = LayerBalance(max_load=6 / 8, avg_max_load=(5 + 6) / 16, objective=2 / 8, ideal=0.5)
    assert layer_balance(SLOTS, shares_of(COUNTS)) == expected


def test_the_objective_counts_a_rank_without_work() -> None:
    # Loads 0.5, 0.5 and 0: no rank is 1/3 over its part, but one is 1/3 under.
    assert layer_balance(((0,), (1,), (2,)), np.array([[0.5, 0.5, 0.0]])).objective == pytest.approx(1 / 3)


def test_replicas_share_rows() -> None:
    loads = rank_loads(((0, 1), (0, 2, 3)), shares_of(COUNTS))
    np.testing.assert_allclose(loads, [[3 / 8, 5 / 8], [1.5 / 8, 6.5 / 8]])


@given(st.data())
def test_loads_agree_with_plain_loops(data: st.DataObject) -> None:
    counts = data.draw(histories())
    history = LoadHistory({"a": counts})
    slots = place(history, data.draw(clusters(counts.shape[1])), "eplb").layers["a"]
    np.testing.assert_allclose(rank_loads(slots, history.shares("a")), naive_loads(slots, history.shares("a")))


def test_every_layer_is_evaluated_on_its_own() -> None:
    history = LoadHistory({"a": COUNTS, "b": COUNTS[:1]})
    placement = Placement({"a": SLOTS, "b": ((3, 2), (1, 0)), "c": SLOTS}, 4, 2, "by hand")
    assert {name: balance.max_load for name, balance in evaluate(placement, history).items()} == {
        "a": 6 / 8,
        "b": 5 / 8,
    }


def test_a_placement_of_something_else_is_refused() -> None:
    with pytest.raises(PlacementError, match="made for 3 experts; the history has 4"):
        evaluate(Placement({"a": ((0, 1), (2,))}, 3, 2, "by hand"), LoadHistory({"a": COUNTS}))
    with pytest.raises(PlacementError, match="layer 'b' of the history is not in the placement"):
        evaluate(Placement({"a": SLOTS}, 4, 2, "by hand"), LoadHistory({"b": COUNTS}))


def test_bytes_by_hand() -> None:
    # Half of 8 rows leave their rank, and come back: 8 rows of 10 bytes. In batch 0 rank 0 computes 5 rows, receives
    # 2.5 of them, and sends 1.5 of the 3 others; rank 1 receives 1.5 and sends 2.5: 4 rows each way, whoever it is.
    assert network_bytes(SLOTS, COUNTS, 10) == NetworkBytes(total=80.0, busiest_rank=80.0, busiest_node=0.0)


def test_the_busiest_of_three_ranks() -> None:
    # 9 rows all go to rank 0, which owns 3: 6 come and go back; the others each send 3 and get them back.
    found = network_bytes(((0,), (1,), (2,)), np.array([[9, 0, 0]]), 10)
    assert found.total == pytest.approx(120.0)
    assert found.busiest_rank == pytest.approx(120.0)
    assert found.busiest_node == 0.0


def test_the_busiest_node() -> None:
    # Four ranks on two nodes, 8 rows, all to rank 0: half of them come from the other node, and go back.
    found = network_bytes(((0,), (1,), (2,), (3,)), np.array([[8, 0, 0, 0]]), 10, num_nodes=2)
    assert found == NetworkBytes(total=120.0, busiest_rank=120.0, busiest_node=80.0)


def test_one_rank_sends_nothing() -> None:
    assert network_bytes(((0, 1, 2, 3),), COUNTS, 10) == NetworkBytes(0.0, 0.0, 0.0)


def test_bounds_by_hand() -> None:
    # Without replicas the hottest expert's rank holds a second one, at least the coldest: 4 + 1 and 6 + 0 of 8 rows.
    assert lower_bounds(shares_of(COUNTS), Cluster((2, 2))) == LowerBounds(6 / 8, 11 / 16)
    # A spare slot halves the hottest: then the mean decides the first batch.
    assert lower_bounds(shares_of(COUNTS), Cluster((3, 2))) == LowerBounds(0.5, 0.5)


@given(st.data())
def test_no_placement_is_under_the_bounds(data: st.DataObject) -> None:
    shares = shares_of(data.draw(histories(max_experts=6)))
    cluster = Cluster.even(data.draw(st.integers(1, 3)), shares.shape[1])
    bounds = lower_bounds(shares, cluster)
    for slots in partitions(range(shares.shape[1]), cluster.slots):
        balance = layer_balance(slots, shares)
        assert balance.max_load >= bounds.max_load - 1e-12
        assert balance.avg_max_load >= bounds.avg_max_load - 1e-12


@given(st.data())
def test_replicas_do_not_get_under_the_bounds(data: st.DataObject) -> None:
    history = LoadHistory({"a": data.draw(histories())})
    cluster = data.draw(clusters(history.num_experts))
    bounds = lower_bounds(history.shares("a"), cluster)
    for strategy in ("contiguous", "eplb", "balanced"):
        balance = evaluate(place(history, cluster, strategy), history)["a"]
        assert balance.max_load >= bounds.max_load - 1e-12
        assert balance.avg_max_load >= bounds.avg_max_load - 1e-12
