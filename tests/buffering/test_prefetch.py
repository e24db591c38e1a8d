"""Fetching ahead: what is predicted, what it may replace, what becomes of wrong guesses; never another result."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.buffering import PREVIOUS, ROUTER, BufferedExperts, RouterGuess
from fairseq_moe_opt.buffering.prefetch import next_layers, wants_all
from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights
from tests.helpers.buffers import MemorySource, compute, pool_over
from tests.helpers.layers import random_experts

ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(5))
PHASES = {"e0": "encoder", "e1": "encoder", "d0": "decoder", "d1": "decoder"}


def settle(store: BufferedExperts) -> None:
    """Wait until nothing is being fetched."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with store.pool.changed:
            if not store.pool.group(store.layer).loading:
                return
        time.sleep(0.001)
    raise AssertionError("the readers do not come to an end")


@given(
    st.lists(st.tuples(st.sampled_from(sorted(PHASES)), st.sets(st.integers(0, 5), min_size=1)), max_size=14),
    st.integers(1, 24),
    st.sampled_from([1, 3, 40]),
    st.integers(0, 2**16),
)
def test_prefetch_changes_no_result(visits: list[tuple[str, set[int]]], slots: int, routed: int, seed: int) -> None:
    experts = {name: random_experts(6) for name in PHASES}
    source = MemorySource(experts, longest_delay=0.0005, seed=seed)
    stores = pool_over(experts, slots, source=source, prefetch=PREVIOUS, phases=PHASES)
    for name, needed in visits:
        results = compute(stores[name], sorted(needed), ROWS, routed=routed)
        for expert in needed:
            assert torch.equal(results[expert], expert_ffn(ROWS, experts[name].expert(expert), "relu"))


def test_layers_come_in_turn() -> None:
    stores = pool_over({name: random_experts(2) for name in PHASES}, 4, phases=PHASES)
    after = next_layers([store.layer for store in stores.values()])
    assert {name: layer.name for name, layer in after.items()} == {"e0": "e1", "e1": "d0", "d0": "d1", "d1": "d0"}


def test_many_rows_want_whole_layers_within_a_phase() -> None:
    stores = pool_over({name: random_experts(6) for name in PHASES}, 4, phases=PHASES)
    e0, e1, d0 = (stores[name].layer for name in ("e0", "e1", "d0"))
    assert wants_all(e0, e1, 12)
    assert not wants_all(e0, e1, 11)
    assert not wants_all(e1, d0, 1000)
    assert not wants_all(e0, e1, None)


def test_the_encoder_streams_the_next_layer() -> None:
    stores = pool_over({name: random_experts(6) for name in PHASES}, 12, prefetch=PREVIOUS, phases=PHASES)
    compute(stores["e0"], range(6), ROWS, routed=60)
    settle(stores["e0"])
    assert stores["e0"].pool.resident("e1") == (0, 1, 2, 3, 4, 5)
    compute(stores["e1"], [0, 1, 2, 3, 5], ROWS, routed=60)
    report = stores["e1"].layer.counters.snapshot()
    assert (report.hits, report.misses) == (5, 0)
    assert (report.fetched_ahead, report.fetched_ahead_used) == (6, 5)
    assert (report.precision, report.recall) == (5 / 6, 1.0)


def test_streaming_makes_room_also_the_first_time() -> None:
    stores = pool_over({name: random_experts(6) for name in PHASES}, 12, prefetch=PREVIOUS, phases=PHASES)
    compute(stores["d1"], range(6), ROWS)  # of no use until the encoder is done
    compute(stores["e0"], range(6), ROWS, routed=60)
    settle(stores["e0"])
    # A forward keeps its own experts until it has computed them: those of d1 went.
    assert stores["e0"].pool.resident("e1") == (0, 1, 2, 3, 4, 5)


def test_the_previous_step_predicts_the_next() -> None:
    stores = pool_over({name: random_experts(6) for name in ("d0", "d1")}, 6, prefetch=PREVIOUS)
    for needed in ([0, 1, 2], [1, 2, 5]):
        compute(stores["d0"], [0], ROWS, routed=2)
        compute(stores["d1"], needed, ROWS, routed=3)
    report = stores["d1"].layer.counters.snapshot()
    assert (report.predicted, report.predicted_right, report.predicted_of) == (3, 2, 3)


def test_the_router_predicts_from_the_tokens_before() -> None:
    gate = torch.eye(6, 8)
    stores = pool_over({name: random_experts(6) for name in ("d0", "d1")}, 12, prefetch=ROUTER)
    prefetcher = stores["d0"]._prefetcher
    assert prefetcher is not None
    prefetcher.set_router("d1", RouterGuess(lambda tokens: tokens @ gate.t(), 2))
    compute(stores["d0"], [0], ROWS, routed=4)
    stores["d0"].look_ahead(torch.eye(2, 8) + 2 * torch.eye(8)[[4, 4]], rows=4)
    settle(stores["d0"])
    assert stores["d0"].pool.resident("d1") == (0, 1, 4)


class HeldSource:
    """Lets nothing through until it is released."""

    def __init__(self, inner: MemorySource) -> None:
        self.inner, self.started, self.released = inner, threading.Event(), threading.Event()

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        self.started.set()
        self.released.wait(10)
        return self.inner.load(key, into)


def test_wrong_guesses_in_the_queue_are_cancelled() -> None:
    experts = {name: random_experts(6) for name in ("d0", "d1")}
    source = HeldSource(MemorySource(experts))
    store = pool_over(experts, 12, source=source, prefetch=PREVIOUS, readers=1)["d1"]
    pool = store.pool
    with pool.changed:
        pool.fetch_ahead(store.layer, [0, 1, 2, 3], certain=False)
    assert source.started.wait(10)
    timer = threading.Timer(0.05, source.released.set)
    timer.start()
    compute(store, [3, 4], ROWS)
    timer.join()
    settle(store)
    # The one that was being fetched already came to its end; 3 was joined, 1 and 2 were given up.
    assert set(source.inner.loads) == {ExpertKey("d1", expert) for expert in (0, 3, 4)}
    report = store.layer.counters.snapshot()
    assert (report.fetched_ahead, report.fetched_ahead_used) == (2, 1)
    assert (report.predicted, report.predicted_right, report.predicted_of) == (4, 1, 2)


def test_nothing_that_is_needed_sooner_makes_room() -> None:
    experts = {name: random_experts(4) for name in ("d0", "d1", "d2")}
    stores = pool_over(experts, 6, prefetch=PREVIOUS)
    for _ in range(4):
        for name in experts:
            compute(stores[name], [0, 1], ROWS)
    before = {name: stores[name].pool.resident(name) for name in experts}
    with stores["d0"].pool.changed:
        # d0 comes next, d1 after it: what both need stays, whatever is guessed for d2.
        stores["d0"].pool.fetch_ahead(stores["d2"].layer, [2, 3], certain=False)
    settle(stores["d0"])
    assert {name: stores[name].pool.resident(name) for name in ("d0", "d1")} == {
        name: before[name] for name in ("d0", "d1")
    }


def test_a_guess_replaces_only_what_is_not_needed_for_long() -> None:
    experts = {name: random_experts(4) for name in ("d0", "d1")}
    stores = pool_over(experts, 4, prefetch=None)
    compute(stores["d0"], [3], ROWS)
    for _ in range(12):
        for name in experts:
            compute(stores[name], [0], ROWS)
    store = stores["d0"]
    compute(stores["d1"], [1], ROWS)
    assert (store.pool.resident("d0"), store.pool.resident("d1")) == ((0, 3), (0, 1))
    with store.pool.changed:
        store.pool.fetch_ahead(store.layer, [1, 2], certain=False)
    settle(store)
    # Expert 3 of d0 was not used for long; the others were just now.
    assert (store.pool.resident("d0"), store.pool.resident("d1")) == ((0, 1), (0, 1))


def test_a_failed_guess_is_no_error_until_it_is_needed() -> None:
    experts = {name: random_experts(4) for name in ("d0", "d1")}
    source = MemorySource(experts)
    source.broken = {ExpertKey("d1", 2)}
    store = pool_over(experts, 8, source=source, prefetch=PREVIOUS)["d1"]
    with store.pool.changed:
        store.pool.fetch_ahead(store.layer, [1, 2], certain=False)
    settle(store)
    assert store.pool.resident("d1") == (1,)
    compute(store, [0, 1], ROWS)
    with pytest.raises(Exception, match="expert 2 of d1 cannot be read"):
        compute(store, [2], ROWS)
