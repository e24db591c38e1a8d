"""Where the time of a forward goes: every moment belongs to the innermost component that is open.

A clock is told when components begin and end, and cuts the time between into slices. So nothing is counted twice, and
what belongs to no component, embeddings, norms, dense feed-forward networks, is the *rest*. How long a forward took as
a whole is read apart from that: the slices have to add up to it, and a profile says how well they do.

On a GPU the marks are events on its stream, read when they have all happened: nothing ever waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager as Context
from dataclasses import dataclass, field
from operator import sub
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import torch

from fairseq_moe_opt.moe.exchange_report import COMBINE, COUNTS, DISPATCH

GATE, SORT, SIZES, TOKENS, FETCH, EXPERTS, MERGE, ATTENTION, REST = COMPONENTS = (
    "gate",
    "dispatch",
    "exchange sizes",
    "exchange tokens",
    "expert fetch",
    "expert FFN",
    "combine",
    "attention",
    "rest",
)
"""Everything that a forward's time is divided into, in the order in which a sparse layer does it."""

STEP_COMPONENTS: Mapping[str, str] = {
    "routing": GATE,
    "dispatch": SORT,
    "fetch": FETCH,
    "experts": EXPERTS,
    "combine": MERGE,
}
EXCHANGE_COMPONENTS: Mapping[str, str] = {COUNTS: SIZES, DISPATCH: TOKENS, COMBINE: TOKENS}

_FOLD_AT = 50_000
"""Slices on a device that are kept before they are added up."""


class Key(NamedTuple):
    """Whose time it is: the phase, the layer or module, and the component."""

    phase: str
    place: str
    component: str


@dataclass
class Times:
    """What a clock found out for one input.

    Attributes:
        seconds: of each component.
        forwards: seconds of each forward of a phase as a whole, read apart from the components.
    """

    seconds: dict[Key, float] = field(default_factory=dict)
    forwards: dict[str, list[float]] = field(default_factory=dict)

    def whole(self, phase: str) -> float:
        """Seconds of all forwards of a phase."""
        return sum(self.forwards.get(phase, ()))

    def components(self, phase: str) -> dict[str, float]:
        """Seconds of each component of a phase, over all its layers and modules."""
        found = dict.fromkeys(COMPONENTS, 0.0)
        for key, seconds in self.seconds.items():
            if key.phase == phase:
                found[key.component] += seconds
        return found

    def of_layer(self, place: str) -> dict[str, float]:
        """Seconds of each component of one layer or module."""
        return {key.component: seconds for key, seconds in self.seconds.items() if key.place == place}


Mark = Any
"""A moment: seconds on the host, or an event on a GPU."""


class _Open(threading.local):
    """What is open in this thread: components from the outside in, the last mark, and forwards under way."""

    def __init__(self) -> None:
        self.stack: list[Key] = []
        self.last: Mark = None
        self.slices: list[tuple[Key, Mark, Mark]] = []
        self.roots: list[_Root] = []


@dataclass
class _Root:
    """A forward under way, and the spans of time that are its own, not a forward's within it."""

    phase: str
    began: Mark
    spans: list[tuple[Mark, Mark]] = field(default_factory=list)


class Clock:
    """Cuts the time of forwards into slices; for several threads at once, each with forwards of its own.

    ``device`` gives the device of the model, and is asked when the first forward begins: a model may move until then.

    Attributes:
        times: where slices are added; may be changed between forwards after ``settle``.
    """

    def __init__(self, device: Callable[[], torch.device]) -> None:
        self.times = Times()
        self._device = device
        self._is_cuda = False
        self._mark: Callable[[], Mark] = self._first_mark
        self._open = _Open()
        self._lock = threading.Lock()
        self._slices: list[tuple[Key, Mark, Mark]] = []
        self._roots: list[_Root] = []

    def enter(self, key: Key) -> None:
        """``key`` begins; what was open before it goes on when it ends."""
        here, now = self._open, self._mark()
        if here.stack:
            here.slices.append((here.stack[-1], here.last, now))
        here.stack.append(key)
        here.last = now

    def leave(self) -> None:
        """What began last ends."""
        here, now = self._open, self._mark()
        here.slices.append((here.stack.pop(), here.last, now))
        here.last = now
        if not here.stack and not here.roots:
            self._hand_over(None)

    def begin(self, phase: str, place: str) -> None:
        """A forward of ``phase`` begins; what it does that is no other component is its rest."""
        here, now = self._open, self._mark()
        if here.roots:
            outer = here.roots[-1]
            outer.spans.append((outer.began, now))
        here.roots.append(_Root(phase, now))
        self.enter(Key(phase, place, REST))

    def end(self) -> None:
        """The forward that began last ends."""
        self.leave()
        here, now = self._open, self._mark()
        root = here.roots.pop()
        root.spans.append((root.began, now))
        if here.roots:
            here.roots[-1].began = now
        self._hand_over(root)

    def settle(self) -> Times:
        """``times`` with everything in them that has ended."""
        with self._lock:
            self._fold()
            return self.times

    def timed(self, key: Key) -> Timed:
        """The context of a component."""
        return Timed(self, key)

    def _first_mark(self) -> Mark:
        self._is_cuda = self._device().type == "cuda"
        self._mark = _event if self._is_cuda else perf_counter
        return self._mark()

    def _hand_over(self, root: _Root | None) -> None:
        here = self._open
        slices, here.slices = here.slices, []
        with self._lock:
            self._slices += slices
            if root is not None:
                self._roots.append(root)
            if not self._is_cuda or len(self._slices) > _FOLD_AT:
                self._fold()

    def _fold(self) -> None:
        if self._is_cuda and self._slices:
            torch.cuda.synchronize()
        seconds, between = self.times.seconds, _between_events if self._is_cuda else sub
        for key, start, stop in self._slices:
            seconds[key] = seconds.get(key, 0.0) + between(stop, start)
        for root in self._roots:
            whole = sum(between(stop, start) for start, stop in root.spans)
            self.times.forwards.setdefault(root.phase, []).append(whole)
        self._slices, self._roots = [], []


class Timed(Context[None]):
    """The time of a ``with`` block belongs to a component."""

    def __init__(self, clock: Clock, key: Key) -> None:
        self._clock, self._key = clock, key

    def __enter__(self) -> None:
        self._clock.enter(self._key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.leave()


def _between_events(stop: torch.cuda.Event, start: torch.cuda.Event) -> float:
    return float(start.elapsed_time(stop)) / 1000


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
