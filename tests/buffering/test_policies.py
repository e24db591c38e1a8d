"""Who makes room: tables worked by hand, the planner's order, and the simulator against Belady."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.buffering import BELADY, POLICIES, find_policy, simulate
from fairseq_moe_opt.buffering.policies import History, PlannedLoad, plan_loads
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.trace import TraceVisit
from fairseq_moe_opt.moe.types import ExpertKey


def key(expert: int, layer: str = "a") -> ExpertKey:
    return ExpertKey(layer, expert)


def history(*visits: tuple[str, list[int]]) -> History:
    """Each visit loads what was never loaded before."""
    past = History()
    for layer, needed in visits:
        past.note_visit(layer, needed)
        for expert in needed:
            if ExpertKey(layer, expert) not in past.loaded:
                past.note_load(ExpertKey(layer, expert))
    return past


# Loaded in the order 0 1 2 3 4; 4 and 1 in the last forward.
PAST = history(("a", [0, 1]), ("a", [0, 2]), ("a", [0, 3]), ("a", [1, 4]))
ORDER = {
    "lifo": [3, 2, 0, 4, 1],  # inactive first, the last one loaded first
    "fifo": [0, 1, 2, 3, 4],
    "lru": [2, 0, 3, 1, 4],  # last uses: visits 2, 3, 3, 4, 4
    "lfu": [2, 3, 4, 1, 0],  # uses: 1, 1, 1, 2, 3
    "lfru": [2, 3, 4, 1, 0],  # the same within a half-life
    "reuse": [2, 3, 0, 4, 1],  # what the last forward used is likely to come again
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_who_goes_first(policy: str) -> None:
    rule = find_policy(policy)
    assert sorted(range(5), key=lambda expert: rule(PAST, key(expert))) == ORDER[policy]


def test_experts_of_a_layer_that_comes_late_go_first() -> None:
    past = history(*[("enc", [0, 1])], *[("dec", [0]), ("dec", [0]), ("dec", [1])] * 3, ("enc", [0, 1]), ("dec", [0]))
    assert past.until_forward("enc") > past.until_forward("dec") == 2
    rule = find_policy("reuse")
    assert max(rule(past, key(e, "enc")) for e in (0, 1)) < min(rule(past, key(e, "dec")) for e in (0, 1))


def test_the_encoders_experts_are_not_active_in_the_decoder() -> None:
    past = history(("enc", [0, 1]), ("dec", [0]))
    assert past.is_active(key(0, "enc"))
    past.note_visit("dec", [0])
    assert not past.is_active(key(0, "enc"))
    assert past.is_active(key(0, "dec"))


def test_an_unknown_policy_lists_the_known() -> None:
    with pytest.raises(OptionError, match="'mru' is not one of reuse, lfru, lifo, fifo, lru, lfu"):
        find_policy("mru")


def rank(one: ExpertKey) -> tuple[float, ...]:
    return (one.expert,)


def test_free_slots_then_the_lowest_rank() -> None:
    missing = [key(expert) for expert in (10, 11, 12, 13, 14)]
    plan = plan_loads(missing, 1, [key(5), key(4)], [key(1)], rank, depth=2)
    assert plan == (
        PlannedLoad(key(10), None),
        PlannedLoad(key(11), key(1)),  # a hit, which is computed first
        PlannedLoad(key(12), key(4)),
        PlannedLoad(key(13), key(5)),
        PlannedLoad(key(14), key(10)),
    )


def test_the_last_loads_are_not_reused_at_once() -> None:
    missing = [key(expert) for expert in range(6)]
    latest_first = plan_loads(missing, 3, [], [], lambda one: (-one.expert,), depth=2)
    # Serially the one just computed would go; with two in flight it is the one before it.
    assert [load.victim for load in latest_first[3:]] == [key(1), key(2), key(3)]
    serial = plan_loads(missing, 3, [], [], lambda one: (-one.expert,), depth=1)
    assert [load.victim for load in serial[3:]] == [key(2), key(3), key(4)]


def test_what_others_hold_is_waited_for() -> None:
    assert plan_loads([key(0), key(1)], 0, [], [], rank, depth=4) == ()
    assert len(plan_loads([key(0), key(1)], 1, [], [], rank, depth=4)) == 2


@given(st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=30), st.integers(1, 7))
def test_nobody_beats_belady(needs: list[set[int]], slots: int) -> None:
    visits = [TraceVisit("a", tuple(sorted(needed))) for needed in needs]
    best = simulate(visits, slots, BELADY)["a"]
    for policy in POLICIES:
        found = simulate(visits, slots, policy)["a"]
        assert found.hits + found.misses == best.hits + best.misses == sum(map(len, needs))
        assert found.misses >= best.misses >= len(set().union(*needs))


def test_pools_of_their_own_do_not_touch_each_other() -> None:
    visits = [TraceVisit("a", (0, 1)), TraceVisit("b", (0, 1, 2)), TraceVisit("a", (0, 1))]
    assert simulate(visits, {"a": 2, "b": 1}, "lru")["a"].hits == 2
    assert simulate(visits, 3, "lru")["a"].hits == 0
    assert simulate(visits, 3, "lru")["b"].miss_rate == 1.0
