"""Re-planning from a running placement: how far it may go, and that it pays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.errors import OptionError, PlacementError
from fairseq_moe_opt.placement import Cluster, LoadHistory, Placement, evaluate, moves_between, place, replan
from fairseq_moe_opt.placement import synthetic_history as synthetic
from tests.helpers.placements import clusters, histories

# Rank 0 has the two hot experts; exchanging 1 and 2 is the one swap that helps.
RUNNING = Placement({"a": ((0, 1), (2, 3))}, 4, 2, "contiguous", "f")
HISTORY = LoadHistory({"a": np.array([[6, 6, 1, 1], [6, 6, 1, 1]])})


def test_the_swap_that_helps_is_made_and_no_other() -> None:
    better = replan(RUNNING, HISTORY)
    assert sorted(map(set, better.layers["a"]), key=min) in ([{0, 2}, {1, 3}], [{0, 3}, {1, 2}])
    assert len(moves_between(RUNNING, better)) == 2
    assert (better.strategy, better.fingerprint) == ("contiguous", "f")
    assert replan(better, HISTORY) == better


@pytest.mark.parametrize(("max_moves", "moved"), [(0, 0), (1, 0), (2, 2), (3, 2)])
def test_no_more_moves_than_allowed(max_moves: int, moved: int) -> None:
    assert len(moves_between(RUNNING, replan(RUNNING, HISTORY, max_moves=max_moves))) == moved


def test_a_move_has_to_pay_its_price() -> None:
    # The squared loads fall from (12/14)^2 + (2/14)^2 to 1/2: by a third, a sixth for each of the two moves.
    saved = (148 / 196 - 0.5) / (148 / 196)
    assert replan(RUNNING, HISTORY, least_gain=saved / 2 + 0.01) == RUNNING
    assert replan(RUNNING, HISTORY, least_gain=saved / 2 - 0.01) != RUNNING


def test_layers_without_history_stay() -> None:
    running = Placement({"a": RUNNING.layers["a"], "b": ((3, 2), (1, 0))}, 4, 2, "contiguous")
    assert replan(running, HISTORY).layers["b"] == ((3, 2), (1, 0))


def test_the_allowance_goes_where_it_gains_most() -> None:
    running = Placement({"a": ((0, 1), (2, 3)), "b": ((0, 1), (2, 3))}, 4, 2, "contiguous")
    history = LoadHistory({"a": np.array([[4, 4, 3, 3]] * 2), "b": np.array([[6, 6, 1, 1]] * 2)})
    better = replan(running, history, max_moves=2)
    assert {move.layer for move in moves_between(running, better)} == {"b"}


@given(st.data())
def test_never_worse_and_within_the_allowance(data: st.DataObject) -> None:
    history = LoadHistory({"a": data.draw(histories())})
    cluster = data.draw(clusters(history.num_experts))
    running = place(history, cluster, data.draw(st.sampled_from(["contiguous", "eplb"])))
    allowed = data.draw(st.integers(0, 6))
    better = replan(running, history, max_moves=allowed, num_nodes=cluster.num_nodes)
    assert len(moves_between(running, better)) <= allowed
    assert better.slots_per_rank("a") == running.slots_per_rank("a")
    before, after = evaluate(running, history)["a"], evaluate(better, history)["a"]
    assert after.objective <= before.objective + 1e-9
    assert after.max_load <= before.max_load + 1e-9


def test_a_few_moves_bring_most_of_the_gain() -> None:
    history = synthetic("lm", 64, 64, 1, 6)
    running = place(history, Cluster.even(8, 64), "contiguous")

    def load(placement: Placement) -> float:
        return evaluate(placement, history)["lm.0"].avg_max_load

    few, many = replan(running, history, max_moves=16), replan(running, history)
    assert len(moves_between(running, few)) <= 16 < len(moves_between(running, many))
    assert load(running) - load(few) > 0.5 * (load(running) - load(many))


def test_what_cannot_be_replanned() -> None:
    with pytest.raises(OptionError, match="'max_moves': must be 0 or more; got -1"):
        replan(RUNNING, HISTORY, max_moves=-1)
    with pytest.raises(OptionError, match=r"'least_gain': must be 0 or more; got -0\.5"):
        replan(RUNNING, HISTORY, least_gain=-0.5)
    with pytest.raises(PlacementError, match="made for 4 experts; the history has 2"):
        replan(RUNNING, LoadHistory({"a": np.ones((2, 2), dtype=int)}))
    with pytest.raises(PlacementError, match="layer 'b' of the history is not in the running placement"):
        replan(RUNNING, LoadHistory({"b": np.ones((2, 4), dtype=int)}))
