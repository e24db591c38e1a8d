"""Threads that fetch experts while others compute; the more urgent first."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable

URGENT, AHEAD = 0, 1
"""What a forward waits for, and what is fetched for a later one."""

_STOP = 2
_Work = Callable[[], None]
_Entry = tuple[int, int, _Work | None]


class Readers:
    """``num_threads`` threads, started at the first piece of work and again in a forked child.

    They end when this object goes away. A piece of work handles its own errors.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._queue: queue.PriorityQueue[_Entry] | None = None
        self._pid = 0

    def submit(self, priority: int, work: _Work) -> None:
        """Have ``work`` called by a thread, before all work of a larger ``priority`` number."""
        self._running_queue().put((priority, next(self._order), work))

    def _running_queue(self) -> queue.PriorityQueue[_Entry]:
        with self._lock:
            if self._queue is None or self._pid != os.getpid():
                self._queue, self._pid = queue.PriorityQueue(), os.getpid()
                for number in range(self.num_threads):
                    name = f"moe-reader-{number}"
                    threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True).start()
                weakref.finalize(self, _stop, self._queue, self.num_threads).atexit = False
            return self._queue


def _serve(entries: queue.PriorityQueue[_Entry]) -> None:
    # Holds the queue only: the pool that the work belongs to can go away while its threads sleep.
    while True:
        work = entries.get()[2]
        if work is None:
            return
        work()
        del work


def _stop(entries: queue.PriorityQueue[_Entry], num_threads: int) -> None:
    for number in range(num_threads):
        entries.put((_STOP, number, None))
