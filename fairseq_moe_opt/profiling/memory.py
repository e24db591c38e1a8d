"""The memory of one forward, allocation by allocation, as torch's profiler sees it: nothing of the process around it.

Recording costs time, so a forward that is recorded is never one that is timed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fairseq_moe_opt.profiling.clock import REST, Key

_PREFIX = "fairseq_moe_opt:"
_ALLOCATION = "[memory]"
_QUIET = ("KINETO_LOG_LEVEL", "6")
"""Keeps the profiler's own messages off the terminal."""


class Moment(NamedTuple):
    """An allocation or a release: microseconds since the forward began, bytes above what was there then, by whom."""

    microseconds: float
    nbytes: int
    component: str


@dataclass(frozen=True)
class Timeline:
    """Memory during one forward, above what was allocated when it began: activations, not weights.

    Attributes:
        phase: of the forward.
        moments: in order of time.
    """

    phase: str
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The first of the moments with most bytes."""
        return max(self.moments, key=lambda moment: moment.nbytes, default=Moment(0.0, 0, REST))

    def peaks(self) -> dict[str, int]:
        """The most bytes there were while each component was at work."""
        found: dict[str, int] = {}
        for moment in self.moments:
            found[moment.component] = max(found.get(moment.component, 0), moment.nbytes)
        return found

    def thinned(self, most: int = 2000) -> Timeline:
        """At most so many moments: of neighbours that are too many, the one with most bytes."""
        if len(self.moments) <= most:
            return self
        edges = [len(self.moments) * place // most for place in range(most + 1)]
        parts = (self.moments[start:stop] for start, stop in pairwise(edges))
        return Timeline(self.phase, tuple(max(part, key=lambda moment: moment.nbytes) for part in parts))


@dataclass(frozen=True)
class WeightBytes:
    """Static memory on the device: all but the experts, and those of the experts that are there (or their slots)."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.dense + self.experts


def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of ``modules``, shared storage once, those without storage not at all."""
    storages: dict[int, int] = {}
    for module in modules:
        for tensor in _tensors(module):
            if tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class MemoryRecording:
    """Records one forward, from ``begin`` to ``end``."""

    def __init__(self, phase: str, device: torch.device) -> None:
        self._phase, self._device = phase, device
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def begin(self) -> None:
        """Start recording."""
        with _quiet():
            self._profile.start()

    def component(self, key: Key) -> Context[None]:
        """The context that a component runs in."""
        return _Range(key.component)

    def end(self) -> Timeline:
        """Stop, and say what was recorded."""
        with _quiet():
            self._profile.stop()
        result = self._profile.profiler
        events = [] if result is None or result.kineto_results is None else result.kineto_results.events()
        return Timeline(self._phase, tuple(moments(_Event.read(events, self._device.type.upper()))))


class _Range(Context[None]):
    """``record_function``, whose own exit does not declare to return nothing."""

    def __init__(self, component: str) -> None:
        self._inside = record_function(_PREFIX + component)

    def __enter__(self) -> None:
        self._inside.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.__exit__(kind, error, trace)


class _Event(NamedTuple):
    """Something at a moment in nanoseconds: a component that opens (+1) or closes (-1), or ``nbytes`` of memory (0)."""

    moment: int
    opens: int
    component: str
    nbytes: int

    @classmethod
    def read(cls, events: Iterable[object], device: str) -> list[_Event]:
        """What torch's profiler saw on ``device``; the order of events at one moment is open, memory, close."""
        found: list[_Event] = []
        for event in events:
            name, start = event.name(), event.start_ns()  # type: ignore[attr-defined]
            if name == _ALLOCATION and event.device_type().name == device:  # type: ignore[attr-defined]
                found.append(cls(start, 0, "", event.nbytes()))  # type: ignore[attr-defined]
            elif name.startswith(_PREFIX):
                component = name.removeprefix(_PREFIX)
                found.append(cls(start, 1, component, 0))
                found.append(cls(start + event.duration_ns(), -1, component, 0))  # type: ignore[attr-defined]
        return sorted(found, key=lambda one: (one.moment, -one.opens))


def moments(events: Sequence[_Event]) -> Iterator[Moment]:
    """Running sums of allocations, each with the innermost component that was open."""
    stack: list[str] = []
    total = 0
    for event in events:
        if event.opens > 0:
            stack.append(event.component)
        elif event.opens < 0:
            stack.pop()
        else:
            total += event.nbytes
            yield Moment((event.moment - events[0].moment) / 1000, total, stack[-1] if stack else REST)


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library reads its own log level from the environment when it is first used."""
    name, level = _QUIET
    before = os.environ.get(name)
    if before is None:
        os.environ[name] = level
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
