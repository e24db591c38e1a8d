"""Clusters, placements, what follows from them, and what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from fairseq_moe_opt.errors import OptionError, PlacementError
from fairseq_moe_opt.placement import Cluster, Move, Placement, moves_between
from fairseq_moe_opt.placement.types import RankSlots, fractions_of


def one_layer(slots: RankSlots, num_experts: int) -> Placement:
    return Placement({"decoder.3": slots}, num_experts, len(slots), "by hand")


def test_homes_are_rank_and_slot_of_every_replica() -> None:
    placement = one_layer(((2, 0), (1,), (0, 3)), 4)
    assert placement.homes["decoder.3"] == (((0, 1), (2, 0)), ((1, 0),), ((0, 0),), ((2, 1),))
    assert placement.slots_per_rank("decoder.3") == (2, 1, 2)


def test_replicas_share_an_experts_rows_evenly() -> None:
    expected = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    np.testing.assert_array_equal(fractions_of(((2, 0), (1,), (0,)), 3), expected)


def test_a_rank_may_hold_nothing() -> None:
    assert one_layer(((0, 1), ()), 2).homes["decoder.3"] == (((0, 0),), ((0, 1),))


def test_equality_is_by_content() -> None:
    assert one_layer(((0,), (1,)), 2) == one_layer(((0,), (1,)), 2)
    assert one_layer(((0,), (1,)), 2) != one_layer(((1,), (0,)), 2)


def test_a_placement_cannot_be_changed() -> None:
    layers: dict[str, RankSlots] = {"a": ((0,), (1,))}
    placement = Placement(layers, 2, 2, "by hand")
    layers["b"] = ((1,), (0,))
    assert list(placement.layers) == ["a"]
    with pytest.raises(TypeError):
        placement.layers["b"] = ((1,), (0,))  # type: ignore[index]


def test_placements_can_be_sent() -> None:
    placement = one_layer(((2, 0), (1,)), 3)
    assert pickle.loads(pickle.dumps(placement)) == placement
    assert copy.deepcopy(placement) == placement


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (((0, 1), (2,), ()), r"layer 'decoder.3': has 3 ranks, not 2"),
        (((0, 1), (1,)), r"layer 'decoder.3': expert 2 is on no rank"),
        (((0, 1), (2, 3)), r"layer 'decoder.3': expert 3 is not one of 0 to 2"),
        (((0, 1), (2, -1)), r"layer 'decoder.3': expert -1 is not one of 0 to 2"),
    ],
)
def test_what_is_no_placement(slots: RankSlots, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement({"decoder.3": slots}, 3, 2, "by hand")


def test_a_placement_needs_a_layer() -> None:
    with pytest.raises(PlacementError, match="at least one layer"):
        Placement({}, 3, 2, "by hand")


@pytest.mark.parametrize(
    ("ranks", "experts", "spare", "slots"),
    [(2, 4, 0, (2, 2)), (3, 8, 0, (3, 3, 2)), (4, 3, 0, (1, 1, 1, 0)), (4, 8, 3, (3, 3, 3, 2)), (1, 5, 0, (5,))],
)
def test_even_slots(ranks: int, experts: int, spare: int, slots: tuple[int, ...]) -> None:
    assert Cluster.even(ranks, experts, spare_slots=spare).slots == slots


def test_nodes_hold_neighbouring_ranks() -> None:
    assert Cluster((1,) * 6, num_nodes=2).node_of_rank().tolist() == [0, 0, 0, 1, 1, 1]


def test_clusters_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="'nodes': must divide the 4 ranks; got 3"):
        Cluster((1, 1, 1, 1), num_nodes=3)
    with pytest.raises(OptionError, match="'ranks': must be 1 or more; got 0"):
        Cluster.even(0, 4)
    with pytest.raises(OptionError, match=r"'slots': every one .* got \(1, -1\)"):
        Cluster((1, -1))
    with pytest.raises(OptionError, match=r"'spare_slots': must be 0 to 4 .* got 5"):
        Cluster.even(2, 4, spare_slots=5)
    with pytest.raises(OptionError, match="'slots': 4 experts need as many slots; got 3"):
        Cluster((2, 1)).check_room(4)


def test_moves_are_what_ranks_must_fetch() -> None:
    before, after = one_layer(((0, 1), (2, 3)), 4), one_layer(((2, 0), (1, 3)), 4)
    assert moves_between(before, after) == (Move("decoder.3", 2, 1, 0), Move("decoder.3", 1, 0, 1))


def test_another_order_of_slots_moves_nothing() -> None:
    assert moves_between(one_layer(((0, 1), (2, 3)), 4), one_layer(((1, 0), (3, 2)), 4)) == ()


def test_a_dropped_replica_moves_nothing_and_a_new_one_does() -> None:
    many, few = one_layer(((0, 1), (0, 2)), 3), one_layer(((0, 1), (2,)), 3)
    assert moves_between(many, few) == ()
    assert moves_between(few, many) == (Move("decoder.3", 0, 0, 1),)


def test_moves_need_two_placements_of_the_same() -> None:
    with pytest.raises(PlacementError, match="differ in num_ranks: 2, 1"):
        moves_between(one_layer(((0,), (1,)), 2), one_layer(((0, 1),), 2))
    other = Placement({"encoder.3": ((0,), (1,))}, 2, 2, "by hand")
    with pytest.raises(PlacementError, match="of different layers"):
        moves_between(one_layer(((0,), (1,)), 2), other)
