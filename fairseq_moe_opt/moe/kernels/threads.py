"""A pool of threads in which every torch operation runs on one core.

Many small GEMMs, each spread over all cores, spend their time at thread barriers, and far more so beside a busy
neighbour; one GEMM a core, many at a time, does not meet a barrier until the end of the layer.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")


class SingleCoreThreads:
    """As many threads as torch uses for one operation, each limited to one core; made at first use.

    Made anew when ``torch.set_num_threads`` has changed, and in a forked child (threads do not survive a fork).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._made_for: tuple[int, int] | None = None

    def for_each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Call ``work`` on every item, the earlier ones first, each on whichever thread is free.

        Runs in the calling thread when torch has one thread only; a single item runs on one core too, so that its
        result does not depend on how many came with it. An exception of ``work`` is raised here, after every thread
        has stopped. The caller's inference mode does not reach the threads: they run in it always.
        """
        queue = deque(items)
        if torch.get_num_threads() == 1 or not queue:
            _drain(queue, work)
            return
        num_threads = min(torch.get_num_threads(), len(queue))
        pool = self._get_pool()
        futures = [pool.submit(_drain, queue, work) for _ in range(num_threads)]
        wait(futures)
        for future in futures:
            future.result()

    def _get_pool(self) -> ThreadPoolExecutor:
        with self._lock:
            made_for = (os.getpid(), torch.get_num_threads())
            if self._pool is None or self._made_for != made_for:
                if self._pool is not None and self._made_for is not None and self._made_for[0] == made_for[0]:
                    self._pool.shutdown(wait=False)
                self._pool = _single_core_pool(made_for[1])
                self._made_for = made_for
            return self._pool


def _drain(queue: deque[Item], work: Callable[[Item], None]) -> None:
    # Grad and inference mode are a thread's own; popleft is atomic, so threads share the queue without a lock.
    with torch.inference_mode():
        while True:
            try:
                item = queue.popleft()
            except IndexError:
                return
            work(item)


def _single_core_pool(num_threads: int) -> ThreadPoolExecutor:
    """Start ``num_threads`` threads and limit each.

    ``torch.set_num_threads`` sets the calling thread's own limit and the default that threads started later take, so
    the default is put back once all have started.
    """
    started = threading.Barrier(num_threads + 1)

    def limit() -> None:
        # A thread takes the process's default at its first question or operation; only a limit set later holds.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="moe-experts")
    starting = [pool.submit(limit) for _ in range(num_threads)]
    started.wait()
    wait(starting)
    torch.set_num_threads(num_threads)
    return pool
