"""What every strategy promises, on histories of all shapes, and the registry."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement import (
    DEFAULT_STRATEGY,
    Cluster,
    LoadHistory,
    Strategy,
    evaluate,
    place,
    register_strategy,
    strategy_names,
    synthetic_history,
)
from fairseq_moe_opt.placement.strategies import get_strategy
from tests.helpers.placements import clusters, histories, naive_objective, partitions

NAMES = ("contiguous", "greedy", "anti-correlation", "eplb", "balanced", "minimax", "exact")
QUICK_NAMES = tuple(name for name in NAMES if name != "exact")


def test_the_names_and_the_default() -> None:
    assert strategy_names() == NAMES
    assert DEFAULT_STRATEGY == "balanced"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        OptionError, match="'strategy': 'best' is not one of contiguous, greedy, anti-correlation, eplb"
    ):
        place(LoadHistory({"a": np.ones((1, 2), dtype=int)}), Cluster((1, 1)), "best")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(OptionError, match="the name 'greedy' is taken"):
        register_strategy(Strategy("greedy", get_strategy("greedy").place))


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(OptionError, match="3 experts need as many slots; got 2"):
        place(LoadHistory({"a": np.ones((1, 3), dtype=int)}), Cluster((1, 1)))


@pytest.mark.parametrize("name", QUICK_NAMES)
@given(st.data())
def test_a_valid_placement_within_the_slots_and_twice_the_same(name: str, data: st.DataObject) -> None:
    history = LoadHistory({"a": data.draw(histories())})
    cluster = data.draw(clusters(history.num_experts))
    placement = place(history, cluster, name, fingerprint="f")  # Placement itself checks that no expert is left out
    held = placement.slots_per_rank("a")
    assert all(used <= room for used, room in zip(held, cluster.slots, strict=True))
    replicates = get_strategy(name).replicates
    if not replicates:
        assert sum(held) == history.num_experts
    assert all(len(set(experts)) == len(experts) for experts in placement.layers["a"])
    is_even = max(cluster.slots) - min(cluster.slots) <= 1 and max(cluster.slots) <= history.num_experts
    if replicates and name != "minimax" and cluster.num_nodes == 1 and is_even:
        assert held == cluster.slots
    assert placement == place(history, cluster, name, fingerprint="f")
    assert (placement.strategy, placement.fingerprint) == (name, "f")


@given(st.data())
def test_at_equal_memory_never_worse_than_eplb_on_what_it_saw(data: st.DataObject) -> None:
    history = LoadHistory({"a": data.draw(histories())})
    cluster = data.draw(clusters(history.num_experts))
    theirs = evaluate(place(history, cluster, "eplb"), history)["a"]
    for name in ("balanced", "minimax"):
        ours = evaluate(place(history, cluster, name), history)["a"]
        assert ours.objective <= theirs.objective + 1e-9
        if name == "balanced":
            assert ours.max_load <= theirs.max_load + 1e-9


@given(st.data())
def test_exact_is_the_best_of_all_partitions_and_minimax_not_better(data: st.DataObject) -> None:
    history = LoadHistory({"a": data.draw(histories(max_experts=6, max_batches=4))})
    shares = history.shares("a")
    cluster = Cluster.even(data.draw(st.integers(1, 3)), history.num_experts)
    best = min(naive_objective(slots, shares) for slots in partitions(range(history.num_experts), cluster.slots))
    exact = place(history, cluster, "exact").layers["a"]
    minimax = place(history, cluster, "minimax").layers["a"]
    assert naive_objective(exact, shares) == pytest.approx(best, abs=1e-6)
    assert naive_objective(minimax, shares) >= best - 1e-9


def test_minimax_is_near_the_minimum() -> None:
    ratios = []
    for seed in range(8):
        history = synthetic_history("encoder", 12, 6, 1, seed)
        cluster = Cluster.even(3, 12)
        found = [
            evaluate(place(history, cluster, name), history)["encoder.0"].objective for name in ("minimax", "exact")
        ]
        ratios.append(found[0] / found[1])
    assert np.mean(ratios) < 1.1


def test_exact_refuses_what_it_cannot_prove() -> None:
    with pytest.raises(OptionError, match="'exact' takes up to 256 experts times ranks; got 128 experts times 8 ranks"):
        place(LoadHistory({"a": np.ones((1, 128), dtype=int)}), Cluster.even(8, 128), "exact")


def test_each_layer_is_placed_by_its_own_history() -> None:
    history = LoadHistory({"a": np.array([[9, 8, 1, 1]]), "b": np.array([[1, 1, 9, 8]])})
    layers = place(history, Cluster((2, 2)), "greedy").layers
    assert layers == {"a": ((0, 3), (1, 2)), "b": ((1, 2), (0, 3))}


def test_balanced_beats_eplb_where_experts_are_correlated() -> None:
    """Held out, on traces that no constant was chosen on."""
    ours, theirs = [], []
    for seed in (11, 12):
        seen, unseen = synthetic_history("decoder", 128, 256, 3, seed).halves()
        for name, to in (("balanced", ours), ("eplb", theirs)):
            placement = place(seen, Cluster.even(8, 128), name)
            to += [balance.avg_max_load for balance in evaluate(placement, unseen).values()]
    assert np.mean(ours) < np.mean(theirs)


@pytest.mark.slow
def test_the_largest_case_is_solved_in_seconds() -> None:
    history = synthetic_history("lm", 512, 64, 24, 1)
    cluster = Cluster.even(64, 512)
    started = time.process_time()
    place(history, cluster)
    assert time.process_time() - started < 10
