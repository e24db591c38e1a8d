"""The profiler: attached to a model's layers and modules it times, counts and marks memory; detached, nothing is left.

A front end says what there is to look at, as :class:`Part` and :class:`LayerFacts`, and names what runs: an *input* is
a language, a domain, a file, anything to be compared with others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from fairseq_moe_opt.moe.protocols import RoutingObserver, StepWatch
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceRecorder
from fairseq_moe_opt.moe.types import Dispatch, Routing
from fairseq_moe_opt.profiling.clock import EXCHANGE_COMPONENTS, STEP_COMPONENTS, Clock, Key, Times
from fairseq_moe_opt.profiling.experts import ExpertClock, ExpertTime, expert_times
from fairseq_moe_opt.profiling.memory import MemoryRecording, Timeline

ALL_CALLS = "all calls"
"""The input that a profile is of where nobody says more."""

_NOTHING = nullcontext()
_DECODER, _STEPS_BEFORE = "decoder", 8


@dataclass(frozen=True)
class LayerFacts:
    """What a layer is.

    Attributes:
        name: in its model.
        phase: ``encoder`` or ``decoder``.
        num_experts: E.
        top_k: K.
        capacity_fraction: C of the checkpoint's rule at evaluation, of a batch's rows; None where it has none.
    """

    name: str
    phase: str
    num_experts: int
    top_k: int
    capacity_fraction: float | None = None


@dataclass(frozen=True)
class Part:
    """A module whose forward is timed: as ``component``, or as a whole forward of ``phase`` where that is None."""

    module: nn.Module
    name: str
    phase: str
    component: str | None = None


class Layer(Protocol):
    """What a profiler asks of a sparse layer."""

    def observe(self, observer: RoutingObserver) -> None:
        """Tell it of every routing."""

    def stop_observing(self, observer: RoutingObserver) -> None:
        """The inverse."""

    def watch(self, watch: StepWatch | None) -> None:
        """Run every step in its contexts; None for the inverse."""

    def watch_experts(self, watch: Callable[[str], Context[None]] | None) -> None:
        """Run experts one at a time in its contexts; None for the inverse."""


@dataclass
class Recorded:
    """One input: its label, wall seconds of all that ran, times of components, and who was asked for."""

    label: str
    recorder: TraceRecorder
    times: Times = field(default_factory=Times)
    seconds: float = 0.0

    @property
    def trace(self) -> Trace:
        """What was seen so far."""
        return self.recorder.trace()


class Profiler:
    """Looks at ``layers`` and ``parts``, of a model on the device that ``device`` gives, while attached.

    Attributes:
        facts: of the layers.
        inputs: what was recorded, in order.
        timelines: memory of one forward a phase.
        expert_times: of experts run one at a time; empty unless ``one_by_one`` was used.
    """

    def __init__(
        self,
        facts: Sequence[LayerFacts],
        layers: Sequence[Layer],
        parts: Sequence[Part],
        device: Callable[[], torch.device],
    ) -> None:
        self.facts = tuple(facts)
        self.inputs: list[Recorded] = []
        self.timelines: dict[str, Timeline] = {}
        self.expert_times: list[ExpertTime] = []
        self._layers, self._parts, self._device = tuple(layers), tuple(parts), device
        self._clock = Clock(device)
        self._contexts: dict[Key, Context[None]] = {}
        self._current: Recorded | None = None
        self._to_record: dict[str, int] = {}
        self._recording: tuple[MemoryRecording, int] | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def is_attached(self) -> bool:
        """Whether anything of it is in the model."""
        return bool(self._undo)

    def attach(self) -> None:
        """Begin to look; a second call changes nothing."""
        if self._undo:
            return
        for layer in self._layers:
            layer.observe(self)
            layer.watch(self)
            self._undo += [_StopObserving(layer, self), _StopWatching(layer)]
        self._undo += [_TimedForward.put(part, self) for part in self._parts]

    def detach(self) -> None:
        """Make layers and modules what they were; a second call changes nothing."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def input(self, label: str) -> Iterator[Recorded]:
        """What runs in the ``with`` block is of the input ``label``, which may have been there before."""
        before = self.current
        self.current = next((one for one in self.inputs if one.label == label), None) or self._new_input(label)
        try:
            yield self.current
        finally:
            self.current = before

    def begin(self, label: str) -> None:
        """What runs from now on is of the input ``label``, until another begins."""
        self.current = self._new_input(label)

    @property
    def current(self) -> Recorded | None:
        """The input that what runs now is of; None while nothing is recorded."""
        return self._current

    @current.setter
    def current(self, recorded: Recorded | None) -> None:
        self._clock.settle()
        self._current = recorded
        self._clock.times = Times() if recorded is None else recorded.times

    def settle(self) -> None:
        """Have everything in the times that has ended."""
        self._clock.settle()

    def record_memory(self) -> None:
        """Record the memory of one forward of each phase, instead of timing it: the second, when what happens once
        has happened; of a decoder beside an encoder, whose forwards are steps, one further on in a sentence."""
        phases = {part.phase for part in self._parts if part.component is None}
        self._to_record = dict.fromkeys(phases, 1)
        if len(phases) > 1:
            self._to_record[_DECODER] = _STEPS_BEFORE

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Run experts one at a time in the ``with`` block, each timed; nothing else is recorded meanwhile."""
        clock, recorder = ExpertClock(self._device()), self._recorder()
        for layer, facts in zip(self._layers, self.facts, strict=True):
            layer.observe(recorder)
            layer.watch_experts(partial(clock.expert, facts.name))
        try:
            yield
        finally:
            for layer in self._layers:
                layer.watch_experts(None)
                layer.stop_observing(recorder)
        self.expert_times = expert_times(clock.calls, recorder.trace())

    def observe(self, layer: str, routing: Routing, dispatch: Dispatch) -> None:
        """Count a routing for the current input."""
        if self._current is not None:
            self._current.recorder.observe(layer, routing, dispatch)

    def step(self, layer: str, phase: str, step: str) -> Context[None]:
        """The context of a step of a layer."""
        return self.component(Key(phase, layer, STEP_COMPONENTS[step]))

    def exchange(self, layer: str, phase: str, direction: str) -> Context[None]:
        """The context of a collective of a layer."""
        return self.component(Key(phase, layer, EXCHANGE_COMPONENTS[direction]))

    def component(self, key: Key) -> Context[None]:
        """The context of a component."""
        if self._recording is not None and self._recording[1] == threading.get_ident():
            return self._recording[0].component(key)
        if self._current is None:
            return _NOTHING
        found = self._contexts.get(key)
        if found is None:
            found = self._contexts[key] = self._clock.timed(key)
        return found

    def forward(self, part: Part) -> Context[None]:
        """The context of a whole forward."""
        if self._recording is not None:
            return self.component(Key(part.phase, part.name, "rest"))
        left = self._to_record.get(part.phase)
        if left == 0:
            del self._to_record[part.phase]
            return _RecordedForward(self, part)
        if left is not None:
            self._to_record[part.phase] = left - 1
        return _NOTHING if self._current is None else _WholeForward(self._clock, part)

    def begin_recording(self, part: Part) -> None:
        """Record memory from now on, in this thread's forward."""
        recording = MemoryRecording(part.phase, self._device())
        recording.begin()
        self._recording = (recording, threading.get_ident())

    def end_recording(self, part: Part) -> None:
        """Until now."""
        if self._recording is not None:
            recording, self._recording = self._recording[0], None
            self.timelines[part.phase] = recording.end()

    def _new_input(self, label: str) -> Recorded:
        self.inputs.append(Recorded(label, self._recorder()))
        return self.inputs[-1]

    def _recorder(self) -> TraceRecorder:
        return TraceRecorder([TraceLayer(one.name, one.phase, one.num_experts) for one in self.facts])

    def __deepcopy__(self, memo: dict[int, object]) -> Profiler:
        # A copied model is looked at by a profiler of its own, which has seen nothing and does nothing.
        return Profiler(self.facts, (), (), _cpu)

    def __reduce__(self) -> tuple[Any, ...]:
        return Profiler, (self.facts, (), (), _cpu)


def _cpu() -> torch.device:
    return torch.device("cpu")


@dataclass(frozen=True)
class _StopObserving:
    layer: Layer
    profiler: Profiler

    def __call__(self) -> None:
        self.layer.stop_observing(self.profiler)


@dataclass(frozen=True)
class _StopWatching:
    layer: Layer

    def __call__(self) -> None:
        self.layer.watch(None)


class _WholeForward(Context[None]):
    """A forward that is timed."""

    def __init__(self, clock: Clock, part: Part) -> None:
        self._clock, self._part = clock, part

    def __enter__(self) -> None:
        self._clock.begin(self._part.phase, self._part.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.end()


class _RecordedForward(Context[None]):
    """A forward whose memory is recorded."""

    def __init__(self, profiler: Profiler, part: Part) -> None:
        self._profiler, self._part = profiler, part

    def __enter__(self) -> None:
        self._profiler.begin_recording(self._part)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.end_recording(self._part)


class _TimedForward:
    """A module's ``forward`` in a context of the profiler: an attribute that hides what was there.

    Not a forward hook: fairseq calls ``encoder.forward`` and ``decoder.forward`` directly, and no hook would run.
    """

    def __init__(self, part: Part, profiler: Profiler, forward: Callable[..., Any]) -> None:
        self._part, self._profiler, self._forward = part, profiler, forward
        self._key = None if part.component is None else Key(part.phase, part.name, part.component)
        self.__wrapped__ = forward  # what signatures are read from

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._key is None:
            with self._profiler.forward(self._part):
                return self._forward(*args, **kwargs)
        with self._profiler.component(self._key):
            return self._forward(*args, **kwargs)

    @classmethod
    def put(cls, part: Part, profiler: Profiler) -> Callable[[], None]:
        """Into its module; returns the inverse."""
        own = vars(part.module)
        before = own.get("forward")
        own["forward"] = cls(part, profiler, part.module.forward)
        return _PutBack(part.module, before)


@dataclass(frozen=True)
class _PutBack:
    module: nn.Module
    before: object

    def __call__(self) -> None:
        if self.before is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self.before
