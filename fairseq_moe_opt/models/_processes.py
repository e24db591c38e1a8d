"""The other processes of a command that was started once, and where they meet."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch._C._distributed_c10d import Store, TCPStore

import fairseq_moe_opt
from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.parallel import ProcessGroupRanks, join

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.05
_START_SECONDS, _LAST_WORDS_SECONDS = 600.0, 10.0

Body = Callable[[Any, int, "Callable[[torch.device], ProcessGroupRanks]"], None]
"""What another process does, given what it was told, its rank, and how to meet the others."""


class Meeting:
    """Ranks of one machine meet at a store of rank 0."""

    def __init__(self, store: Store, size: int, timeout: float) -> None:
        self._store, self._size, self._timeout = store, size, timeout

    def join(self, rank: int, device: torch.device) -> ProcessGroupRanks:
        """Become rank ``rank``; every rank does so at the same time."""
        return join(device, self._timeout, self._store, rank=rank, size=self._size)


@contextmanager
def other_processes(body: Body, told: Any, size: int, timeout: float) -> Iterator[Meeting]:
    """Processes for the ranks from 1 on, each doing ``body``; rank 0 is the caller, who joins the meeting.

    At the end they are waited for; after an error here they are killed, if they do not end soon. Raises ParallelError
    when one ends before it has begun.
    """
    patience = timedelta(seconds=timeout)
    store = TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False, timeout=patience)
    context = get_context("spawn")
    processes = [
        context.Process(target=_start, args=(body, told, rank, size, timeout, store.port), name=f"rank {rank}")
        for rank in range(1, size)
    ]
    try:
        for process in processes:
            process.start()
        _wait_for_all(processes, store)
        yield Meeting(store, size, timeout)
        _wait_for_end(processes, timeout)
    except (Exception, SystemExit):
        # They fail too, and one of them may be the one that says why.
        _wait_for_end(processes, min(_LAST_WORDS_SECONDS, timeout))
        raise
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _wait_for_end(processes: Sequence[BaseProcess], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _wait_for_all(processes: Sequence[BaseProcess], store: Store) -> None:
    """Until all processes have found the store, which takes seconds: they import everything anew."""
    deadline = time.monotonic() + _START_SECONDS
    for rank, process in enumerate(processes, 1):
        while not store.check([_arrival(rank)]):
            if process.exitcode is not None or time.monotonic() > deadline:
                how = "does not come up" if process.exitcode is None else f"ended with code {process.exitcode}"
                raise ParallelError(
                    f"rank {rank} {how}: see what it printed, and whether there is memory for {rank + 1}"
                )
            time.sleep(_POLL_SECONDS)


def _start(body: Body, told: Any, rank: int, size: int, timeout: float, port: int) -> None:
    # As --user-dir does; but that would find the package imported already, and register nothing.
    fairseq_moe_opt.register_fairseq()
    store = TCPStore(_HOST, port, size, is_master=False, timeout=timedelta(seconds=timeout))
    store.set(_arrival(rank), "")
    meeting = Meeting(store, size, timeout)
    body(told, rank, lambda device: meeting.join(rank, device))


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"


def command_main(module: str) -> Callable[..., Any]:
    """fairseq's own ``main`` of a command, whatever was wrapped around it."""
    main = importlib.import_module(module).main
    unwrapped: Callable[..., Any] = getattr(main, "__wrapped__", main)
    return unwrapped
