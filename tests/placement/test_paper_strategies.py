"""The paper's strategies and the contiguous one, on cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_moe_opt.placement import Cluster, LoadHistory, place
from fairseq_moe_opt.placement.strategies.anti_correlation import pearson
from fairseq_moe_opt.placement.strategies.greedy import pack


def placed(strategy: str, counts: list[list[int]], cluster: Cluster) -> tuple[tuple[int, ...], ...]:
    return place(LoadHistory({"a": np.array(counts)}), cluster, strategy).layers["a"]


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ((2, 2), ((0, 1), (2, 3))),
        ((2, 1, 1), ((0, 1), (2,), (3,))),
        ((3, 3), ((0, 1), (2, 3))),
        ((1, 5), ((0,), (1, 2, 3))),
        ((0, 4), ((), (0, 1, 2, 3))),
    ],
)
def test_contiguous_is_in_order_and_as_even_as_the_slots_allow(
    slots: tuple[int, ...], expected: tuple[tuple[int, ...], ...]
) -> None:
    assert placed("contiguous", [[1, 1, 1, 1]], Cluster(slots)) == expected


def test_greedy_gives_the_largest_first_to_the_least_loaded() -> None:
    # 6 -> 0 | 5 -> 1 | 4 -> 1 (5 < 6) | 3 -> 0 (6 < 9) | 2 -> 0, which is at 9 like rank 1, and is then full | 1 -> 1
    assert placed("greedy", [[6, 5, 4, 3, 2, 1]], Cluster((3, 3))) == ((0, 3, 4), (1, 2, 5))


def test_greedy_leaves_a_full_rank_out() -> None:
    # 9 -> 0, then 1, 1 -> 1, which is full with two: the last goes to the loaded rank.
    assert placed("greedy", [[9, 1, 1, 1]], Cluster((2, 2))) == ((0, 3), (1, 2))


def test_greedy_with_room_to_spare_holds_uneven_numbers() -> None:
    assert placed("greedy", [[9, 1, 1, 1]], Cluster((3, 3))) == ((0,), (1, 2, 3))


def test_packing_breaks_ties_by_order() -> None:
    assert pack(np.array([1.0, 1.0, 1.0, 1.0]), (2, 2)).tolist() == [0, 1, 0, 1]


def test_anti_correlation_parts_experts_that_are_active_together() -> None:
    # 0 and 3 always work together, so do 1 and 2. By their means, 0 4 4 4 4, greedy puts 0 and 2 (ties by order) on
    # rank 0; so does it here: 2 is not with 0. With 2 and 3 exchanged, greedy pairs what works together.
    apart = [[4, 0, 0, 4], [0, 4, 4, 0]]
    together = [[4, 0, 4, 0], [0, 4, 0, 4]]
    assert placed("greedy", together, Cluster((2, 2))) == ((0, 2), (1, 3))
    assert placed("anti-correlation", together, Cluster((2, 2))) == ((0, 3), (1, 2))
    assert placed("anti-correlation", apart, Cluster((2, 2))) == ((0, 2), (1, 3))


def test_anti_correlation_weighs_heat_against_correlation() -> None:
    # Shares 0.5, 0.3 and 0.1, 0.1, all constant: no correlation is defined, so it is greedy.
    counts = [[5, 3, 1, 1], [5, 3, 1, 1]]
    assert placed("anti-correlation", counts, Cluster((2, 2))) == placed("greedy", counts, Cluster((2, 2)))


def test_correlations_of_constant_experts_are_zero() -> None:
    shares = np.array([[0.1, 0.2, 0.7], [0.1, 0.5, 0.4], [0.1, 0.3, 0.6]])
    np.testing.assert_allclose(pearson(shares), [[0, 0, 0], [0, 1, -1], [0, -1, 1]], atol=1e-12)
