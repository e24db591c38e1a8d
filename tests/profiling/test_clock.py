"""The clock: every moment belongs to one component, and they add up to the whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from fairseq_moe_opt.profiling import clock as clocks
from fairseq_moe_opt.profiling.clock import ATTENTION, EXPERTS, FETCH, REST, Clock, Key
from fairseq_moe_opt.profiling.memory import Moment, Timeline, _Event, moments


def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A clock on which every look takes a second."""
    ticks = count()
    monkeypatch.setattr(clocks, "perf_counter", lambda: float(next(ticks)))
    yield Clock(cpu)


def test_time_belongs_to_the_innermost_component(ticking: Clock) -> None:
    ticking.begin("decoder", "model")  # looks at 0 and 1
    ticking.enter(Key("decoder", "a", EXPERTS))  # 2: one second of rest is over
    with ticking.timed(Key("decoder", "a", FETCH)):  # 3
        pass  # 4: experts again
    ticking.leave()  # 5
    ticking.end()  # 6 ends the rest, 7 the forward
    times = ticking.settle()
    assert times.components("decoder") == {
        **dict.fromkeys(clocks.COMPONENTS, 0.0),
        EXPERTS: 1 + 1,
        FETCH: 1,
        REST: 1 + 1,
    }
    assert times.forwards == {"decoder": [7.0]}  # from 0 to 7: two looks are the clock's own
    assert times.of_layer("a") == {EXPERTS: 2.0, FETCH: 1.0}


def test_a_forward_within_another_is_not_counted_twice(ticking: Clock) -> None:
    ticking.begin("decoder", "model")  # 0, 1
    ticking.begin("encoder", "encoder")  # 2, 3
    ticking.end()  # 4, 5
    ticking.end()  # 6, 7
    times = ticking.settle()
    assert times.forwards == {"encoder": [3.0], "decoder": [2.0 + 2.0]}
    assert times.components("encoder")[REST] == 1.0 and times.components("decoder")[REST] == 2.0 + 2.0


def test_threads_have_forwards_of_their_own() -> None:
    clock = Clock(cpu)
    barrier = threading.Barrier(4)

    def work(place: int) -> None:
        for _ in range(20):
            clock.begin("decoder", "model")
            barrier.wait()
            with clock.timed(Key("decoder", str(place), ATTENTION)):
                barrier.wait()
            clock.end()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = clock.settle()
    assert len(times.forwards["decoder"]) == 80
    assert {key.place for key in times.seconds if key.component == ATTENTION} == set("0123")
    assert sum(times.components("decoder").values()) == pytest.approx(times.whole("decoder"), rel=0.2)


def test_memory_is_a_running_sum_with_who_was_at_work() -> None:
    events = [
        _Event(1000, 1, REST, 0),
        _Event(2000, 0, "", 100),
        _Event(3000, 1, ATTENTION, 0),
        _Event(3000, 0, "", 50),
        _Event(4000, 0, "", -100),
        _Event(4500, -1, ATTENTION, 0),
        _Event(5000, 0, "", 10),
        _Event(6000, -1, REST, 0),
    ]
    found = Timeline("encoder", tuple(moments(events)))
    assert found.moments == (
        Moment(1.0, 100, REST),
        Moment(2.0, 150, ATTENTION),
        Moment(3.0, 50, ATTENTION),
        Moment(4.0, 60, REST),
    )
    assert found.peak == Moment(2.0, 150, ATTENTION) and found.peaks() == {REST: 100, ATTENTION: 150}
    assert found.thinned(2).moments == (Moment(2.0, 150, ATTENTION), Moment(4.0, 60, REST))
