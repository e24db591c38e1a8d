"""EPLB: the example of its README with the output printed there, and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement import Cluster
from fairseq_moe_opt.placement.strategies.eplb import eplb_items, replicate
from fairseq_moe_opt.placement.types import rank_slots

# README of deepseek-ai/EPLB: 12 experts in 4 groups, 16 replicas, 2 nodes, 8 GPUs.
README_LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
README_OUTPUT = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_example_of_the_readme(layer: int) -> None:
    experts, ranks = eplb_items(np.array(README_LOADS[layer], dtype=float), Cluster((2,) * 8, num_nodes=2), 4)
    expected = np.reshape(README_OUTPUT[layer], (8, 2))
    assert rank_slots(experts, ranks, 8) == tuple(tuple(sorted(pair)) for pair in expected.tolist())


def test_replicas_go_to_the_largest_load_a_replica() -> None:
    # 10, 6, 1 -> 5, 6, 1 -> 5, 3, 1 -> 3.3, 3, 1 -> 2.5, 3, 1
    loads = np.array([10.0, 6.0, 1.0])
    assert replicate(loads, 3, 9).tolist() == [0, 1, 2]
    assert replicate(loads, 7, 9).tolist() == [0, 1, 2, 0, 1, 0, 0]
    # 10, 4 -> 5, 4 -> 3.3, 4 -> 3.3, 2
    assert replicate(np.array([10.0, 4.0]), 5, 9).tolist() == [0, 1, 0, 0, 1]


def test_an_expert_has_no_more_replicas_than_ranks() -> None:
    assert replicate(np.array([100.0, 1.0, 1.0]), 5, 2).tolist() == [0, 1, 2, 0, 1]
    assert replicate(np.array([5.0, 1.0]), 9, 2).tolist() == [0, 1, 0, 1]


def test_the_global_variant_by_hand() -> None:
    # 8 gets two replicas of 4. Sorted: 4 4 3 2 1, for 3 and 2 slots: 4 -> 0, 4 -> 1, 3 -> 0, 2 -> 1 (full), 1 -> 0.
    experts, ranks = eplb_items(np.array([8.0, 3.0, 2.0, 1.0]), Cluster((3, 2)))
    assert rank_slots(experts, ranks, 2) == ((0, 1, 3), (0, 2))


def test_groups_stay_on_a_node() -> None:
    loads = np.array([9.0, 9.0, 1.0, 1.0, 5.0, 5.0, 2.0, 2.0])
    experts, ranks = eplb_items(loads, Cluster((2,) * 4, num_nodes=2), 4)
    nodes = {int(expert): int(rank) // 2 for expert, rank in zip(experts, ranks, strict=True)}
    assert [nodes[expert] for expert in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_groups_that_nodes_do_not_divide_are_placed_globally() -> None:
    loads = np.array([4.0, 3.0, 2.0])
    both = [eplb_items(loads, Cluster((2, 2), num_nodes=nodes)) for nodes in (1, 2)]
    np.testing.assert_array_equal(both[0], both[1])


def test_groups_have_to_divide_the_experts() -> None:
    with pytest.raises(OptionError, match="'num_groups': must divide the 3 experts; got 2"):
        eplb_items(np.ones(3), Cluster((2, 2)), 2)
    with pytest.raises(OptionError, match="3 experts need as many slots; got 2"):
        eplb_items(np.ones(3), Cluster((1, 1)))
