"""Statistics of experts' activity, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit
from fairseq_moe_opt.profiling.experts import expected_seconds, expert_times
from fairseq_moe_opt.profiling.statistics import (
    Counts,
    compare_layer,
    correlation,
    gini,
    heat_map,
    inactive_if_even,
    inactive_share,
    layer_counts,
    layer_statistics,
    overlap,
    reuse_distances,
    stickiness,
    waste_factor,
)


def counts(*batches: list[int]) -> Counts:
    return np.array(batches, dtype=np.int64)


# Four batches of four experts: e0 always, e1 in the first and last, e2 in the second and third, e3 never.
FOUR = counts([2, 2, 0, 0], [1, 0, 3, 0], [1, 0, 1, 0], [3, 1, 0, 0])


def test_counts_of_a_trace_are_dense_and_by_layer() -> None:
    layers = (TraceLayer("a", "encoder", 3), TraceLayer("b", "decoder", 2))
    visits = (TraceVisit("a", (0, 2), 4, (1, 3)), TraceVisit("b", (1,), 2, (2,)), TraceVisit("a", (1,), 4, (4,)))
    found = layer_counts(Trace(layers, visits))
    assert found["a"].tolist() == [[1, 0, 3], [0, 4, 0]] and found["b"].tolist() == [[0, 2]]
    assert layer_counts(Trace(layers, visits[:1]))["b"].shape == (0, 2)
    with pytest.raises(InputError, match="record it anew"):
        layer_counts(Trace(layers, (TraceVisit("a", (1,)),)))


@pytest.mark.parametrize(
    ("load", "expected"),
    [([1, 1, 1, 1], 0.0), ([0, 0, 0, 8], 3 / 4), ([0, 1, 3], 1 / 2), ([0, 0], 0.0), ([5], 0.0), ([1, 3], 1 / 4)],
)
def test_gini(load: list[int], expected: float) -> None:
    # [0, 1, 3]: mean absolute difference of all 9 pairs is (1 + 3 + 2) * 2 / 9 = 12/9; half of it by the mean, 4/3.
    assert gini(load) == pytest.approx(expected)


def test_inactive_experts_and_what_even_choices_would_leave() -> None:
    assert inactive_share(FOUR) == 8 / 16
    # 4, 4, 2 and 4 rows are 2, 2, 1 and 2 tokens of 2 choices among 4: each leaves an expert out with 1/2.
    assert inactive_if_even(FOUR, 2) == pytest.approx((1 / 4 + 1 / 4 + 1 / 2 + 1 / 4) / 4)


def test_reuse_distances_are_batches_between_uses() -> None:
    # e0: 1, 1, 1; e1 after two idle batches: 3; e2: 1.
    assert sorted(reuse_distances(FOUR).tolist()) == [1, 1, 1, 1, 3]
    assert reuse_distances(FOUR[:1]).tolist() == []


def test_stickiness_beside_chance() -> None:
    # Of 2 + 2 + 2 uses in the first three batches, e0 is kept thrice and e2 once.
    # By chance: uses before (3, 1, 2, 0) times shares of the last three batches with it (1, 1/3, 2/3, 0).
    kept, by_chance = stickiness(FOUR)
    assert kept == pytest.approx(4 / 6)
    assert by_chance == pytest.approx((3 * 1 + 1 * 1 / 3 + 2 * 2 / 3) / 6)
    assert stickiness(FOUR[:1]) == (0.0, 0.0)


def test_correlation_of_shares() -> None:
    found = correlation(counts([1, 3, 4, 0], [3, 1, 4, 0]))
    assert found[0, 1] == pytest.approx(-1) and found[0, 0] == pytest.approx(1)
    # A share that never changes has no correlation, not a division by zero.
    assert found[2].tolist() == [0, 0, 0, 0] and found[3].tolist() == [0, 0, 0, 0]


def test_waste_factor_is_the_paper_s() -> None:
    assert waste_factor(512, 0.05, 2) == pytest.approx(12.8)
    assert waste_factor(128, 1.0, 2) == 64


def test_all_of_a_layer() -> None:
    found = layer_statistics(FOUR, 2)
    assert found is not None
    assert (found.batches, found.rows, found.mean_rows) == (4, 14, 3.5)
    assert found.load == pytest.approx((7 / 14, 3 / 14, 4 / 14, 0))
    assert (found.max_share, found.worst_share) == (pytest.approx((1 / 2 + 3 / 4 + 1 / 2 + 3 / 4) / 4), 3 / 4)
    assert found.hottest == 0 and found.worst_expert == 2 and found.never_used == (3,)
    assert found.reuse_within == {1: 0.8, 2: 0.8, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0} and found.median_reuse == 1.0
    assert found.strongest_pair is not None and found.opposite_pair is not None
    assert (found.opposite_pair.one, found.opposite_pair.other) == (1, 2)
    assert layer_statistics(counts([0, 0]), 1) is None


def test_inputs_are_compared_by_their_loads() -> None:
    assert overlap(np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5])) == 0.5
    french = counts([8, 0, 2, 0], [8, 0, 2, 0])
    german = counts([0, 6, 2, 2], [0, 4, 4, 2])
    found = compare_layer({"fra": french, "deu": german})
    assert found.overlap == ((1.0, pytest.approx(0.2)), (pytest.approx(0.2), 1.0))
    assert found.mean_overlap == pytest.approx(0.2)
    # Halves of the French are alike; the German ones differ in two tenths.
    assert found.self_overlap == (1.0, pytest.approx(0.8))
    # e2 serves both; e3 is German only, but rarer than even (1/4).
    assert [(one.expert, one.input, one.share, one.next_share) for one in found.specific] == [
        (0, "fra", pytest.approx(0.8), 0.0),
        (1, "deu", pytest.approx(0.5), 0.0),
    ]
    assert compare_layer({"fra": french}).specific == ()


def test_a_heat_map_of_many_batches_is_thinned_by_means() -> None:
    many = np.tile(FOUR, (10, 1))
    assert heat_map(many, 40).shape == (40, 4)
    thin = heat_map(many, 10)
    assert thin.shape == (10, 4) and np.allclose(thin[0], heat_map(FOUR).mean(axis=0))


def test_a_slow_expert_is_one_off_the_line_of_the_others() -> None:
    points = [(1.0, 2.0), (2.0, 3.0), (3.0, 40.0), (4.0, 5.0), (5.0, 6.0)]
    assert expected_seconds(points) == pytest.approx([2, 3, 4, 5, 6])
    layers = (TraceLayer("a", "decoder", 3),)
    trace = Trace(layers, tuple(TraceVisit("a", (0, 1, 2), 3, (1, 2, 3)) for _ in range(3)))
    always, once = [0.1, 0.1, 0.1], [1e-3, 1e-3, 0.5]
    found = expert_times({("a", 0): [1e-3] * 3, ("a", 1): always, ("a", 2): once}, trace)
    # One long call is the machine's doing, three are the expert's.
    assert [one.is_slow for one in found] == [False, True, False]
    assert not any(one.is_slow for one in expert_times({("a", 0): [1e-3], ("a", 1): [0.1], ("a", 2): [1e-3]}, trace))


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 8)), elements=st.integers(0, 9)))
def test_whatever_the_counts_statistics_are_within_their_bounds(some: Counts) -> None:
    found = layer_statistics(some, 1)
    if found is None:
        assert not some.any()
        return
    experts = some.shape[1]
    assert sum(found.load) == pytest.approx(1) and found.rows == some.sum()
    assert -1e-9 <= found.gini <= (experts - 1) / experts + 1e-9
    assert 1 / experts - 1e-9 <= found.max_share <= found.worst_share <= 1
    assert 0 <= found.inactive <= 1 - 1 / experts + 1e-9 and 0 <= found.stickiness <= 1
    assert list(found.reuse_within.values()) == sorted(found.reuse_within.values())
    assert np.abs(correlation(some)).max() <= 1 + 1e-9
