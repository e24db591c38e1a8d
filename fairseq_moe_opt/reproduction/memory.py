"""Activation memory: what the allocator gave out and took back during a forward, as torch's profiler records it.

Not the process's resident memory, which also holds the weights, what the allocator keeps, and other libraries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_EVENT = "[memory]"
_MEMINFO = Path("/proc/meminfo")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that ``work`` holds at any time beyond what was there before.

    It runs in a thread of its own, where no scratch space of an earlier call is left to be used uncounted, and on one
    core, because the profiler records the thread it was started in.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        pass  # the profiler wants to be set up by the main thread
    found: list[int] = []
    failed: list[BaseException] = []

    def run() -> None:
        torch.set_num_threads(1)
        try:
            found.append(_peak(work))
        except BaseException as error:
            failed.append(error)

    threads = torch.get_num_threads()
    thread = threading.Thread(target=run, name="memory")
    thread.start()
    thread.join()
    torch.set_num_threads(threads)
    if failed:
        raise failed[0]
    return found[0]


def _peak(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, torch.inference_mode():
        kept = work()
    del kept
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events = [] if results is None else results.events()
    changes = sorted(
        (event.start_ns(), place, event.nbytes()) for place, event in enumerate(events) if _is_memory(event)
    )
    return running_peak(change for _, _, change in changes)


def _is_memory(event: torch._C._autograd._KinetoEvent) -> bool:
    return event.name() == _EVENT


def running_peak(changes: Iterable[int]) -> int:
    """The largest sum of the first ``changes``, however many; 0 of none."""
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def available_bytes() -> int | None:
    """Memory that could be taken now without swapping; None where the system does not say."""
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
