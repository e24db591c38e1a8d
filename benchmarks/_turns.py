"""Sides that take turns in one process, within limits of time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from _fairseq_work import ALL, CannotRunError, Outputs

Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Limits:
    """How long to measure one workload.

    Attributes:
        rounds: at most so many, in each of which every side runs once.
        budget: seconds; no further round begins that would not fit into them.
        longest: seconds after which a run is given up.
    """

    rounds: int
    budget: float
    longest: float


@dataclass(frozen=True)
class Measured:
    """What one side did.

    Attributes:
        outputs: of its first run, which is for comparing; None when there is none.
        seconds: by phase, one entry a round; of the first run when there was no time for a round.
        rounds: how many there were.
        failure: why there are no outputs, or None.
        stopped_after: seconds after which its first run was given up, or None.
    """

    outputs: Outputs | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0
    failure: str | None = None
    stopped_after: float | None = None


def take_turns(runs: Mapping[str, Run], limits: Limits, progress: Callable[[str], None]) -> dict[str, Measured]:
    """Run every side once, to be compared, then in rounds, each of which begins with another side."""
    first: dict[str, Measured] = {}
    for name, run in runs.items():
        progress(f"comparing: {name}")
        first[name] = _first_run(run, limits.longest)
    able = [name for name, measured in first.items() if measured.outputs is not None]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in able}
    a_round = spent = sum(first[name].seconds[ALL][0] for name in able)
    done = 0
    while able and done < limits.rounds and spent + a_round <= limits.budget:
        for turn in range(len(able)):
            name = able[(turn + done) % len(able)]
            progress(f"round {done + 1} of {limits.rounds}: {name}")
            seconds[name].append(runs[name]().seconds)
        a_round = sum(seconds[name][-1][ALL] for name in able)
        spent, done = spent + a_round, done + 1
    return {name: _with_rounds(measured, seconds.get(name, [])) for name, measured in first.items()}


def _first_run(run: Run, longest: float) -> Measured:
    try:
        with _deadline(longest):
            outputs = run()
    except TimeoutError:
        return Measured(failure=f"not done after {longest:.0f} s", stopped_after=longest)
    except (CannotRunError, RuntimeError, MemoryError) as error:  # RuntimeError: torch's allocator among others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Measured(failure=reason)
    return Measured(outputs, {phase: [value] for phase, value in outputs.seconds.items()})


def _with_rounds(measured: Measured, rounds: list[dict[str, float]]) -> Measured:
    if not rounds:
        return measured
    seconds = {phase: [one[phase] for one in rounds] for phase in rounds[0]}
    return Measured(measured.outputs, seconds, len(rounds))


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread, between two of its operations, after ``seconds``."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
