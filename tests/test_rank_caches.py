"""What a placement does to the caches of ranks: by hand, and the paper's finding on correlated experts."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_moe_opt.buffering import simulate
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.trace import TraceVisit
from fairseq_moe_opt.placement import Cluster, LoadHistory, Placement, place, synthetic_history
from fairseq_moe_opt.placement.types import RankSlots
from fairseq_moe_opt.rank_caches import simulate_ranks


def visits_of(history: LoadHistory) -> list[TraceVisit]:
    """The steps of a history, its layers taking turns."""
    visits = []
    for batch in zip(*history.layers.values(), strict=True):
        for name, counts in zip(history.layers, batch, strict=True):
            needed = np.flatnonzero(counts)
            visits.append(TraceVisit(name, tuple(map(int, needed)), 1, tuple(map(int, counts[needed]))))
    return visits


TOGETHER, APART = ((0, 1), (2, 3)), ((0, 2), (1, 3))
HOT = [TraceVisit("a", (0, 1), 2, (1, 1))] * 4
"""0 and 1 are active together in every step, 2 and 3 never."""
TURNS = [TraceVisit("a", (0, 1), 2, (1, 1)), TraceVisit("a", (2, 3), 2, (1, 1))] * 2
"""The pairs take turns."""


@pytest.mark.parametrize(
    ("visits", "ranks", "slots", "misses", "hits"),
    [
        # One slot for two experts: both miss, then the one that stayed hits and makes room for the other, each step.
        (HOT, TOGETHER, 1, [2 + 1 + 1 + 1, 0], [3, 0]),
        # One slot for one expert that is used: it misses once.
        (HOT, APART, 1, [1, 1], [3, 3]),
        (HOT, TOGETHER, 2, [2, 0], [6, 0]),
        # A rank's pair is asked for in two steps, of which it misses three times out of four ...
        (TURNS, TOGETHER, 1, [2 + 1, 2 + 1], [1, 1]),
        # ... while apart each step drives out what the next one wants.
        (TURNS, APART, 1, [4, 4], [0, 0]),
    ],
)
@pytest.mark.parametrize("policy", ["lifo", "belady"])
def test_misses_by_hand(
    visits: list[TraceVisit], ranks: RankSlots, slots: int, misses: list[int], hits: list[int], policy: str
) -> None:
    found = simulate_ranks(visits, Placement({"a": ranks}, 4, 2, "by hand"), slots, policy)
    assert [rank.misses for rank in found.ranks] == misses
    assert [rank.hits for rank in found.ranks] == hits
    assert found.worst == max(miss / max(miss + hit, 1) for miss, hit in zip(misses, hits, strict=True))
    assert found.overall == sum(misses) / sum(misses + hits)


def test_a_replica_is_asked_for_only_where_there_are_rows_for_it() -> None:
    visits = [TraceVisit("a", (0, 1), 2, (rows, 1)) for rows in (1, 2, 1)]
    found = simulate_ranks(visits, Placement({"a": ((0,), (0, 1))}, 2, 2, "by hand"), 2, "lifo")
    assert [rank.misses + rank.hits for rank in found.ranks] == [3, 1 + 3]


def test_one_rank_is_the_plain_simulation() -> None:
    visits = visits_of(synthetic_history("decoder", 16, 20, 2, 1))
    placement = place(synthetic_history("decoder", 16, 20, 2, 1), Cluster.even(1, 16), "contiguous")
    plain = simulate(visits, {visit.layer: 4 for visit in visits}, "lifo").values()
    (rank,) = simulate_ranks(visits, placement, 4, "lifo").ranks
    assert (rank.hits, rank.misses) == (sum(one.hits for one in plain), sum(one.misses for one in plain))


def neighbours_awake_together(seed: int) -> LoadHistory:
    """16 experts in four topics of neighbouring ids; one topic is awake at a time, mostly for several steps."""
    generator = np.random.default_rng(seed)
    topics = [0]
    for _ in range(79):
        topics.append(topics[-1] if generator.random() < 0.7 else int(generator.integers(4)))
    counts = np.zeros((80, 16), dtype=np.int64)
    for step, topic in enumerate(topics):
        counts[step, 4 * topic : 4 * topic + 4] = generator.integers(1, 9, 4)
    return LoadHistory({"a": counts})


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["anti-correlation", "balanced"])
def test_keeping_correlated_experts_apart_spares_the_worst_rank(strategy: str, slots: int) -> None:
    first, second = neighbours_awake_together(5).halves()
    worst = [
        simulate_ranks(visits_of(second), place(first, Cluster.even(4, 16), name), slots, "lifo").worst
        for name in (strategy, "contiguous")
    ]
    assert worst[0] < worst[1]


def test_no_slot_is_refused() -> None:
    with pytest.raises(OptionError, match="'slots': must be 1 or more; got 0"):
        simulate_ranks(HOT, Placement({"a": TOGETHER}, 4, 2, "by hand"), 0, "lifo")
