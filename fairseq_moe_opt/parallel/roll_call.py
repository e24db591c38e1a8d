"""Who is missing: when a collective fails, ranks that are alive sign in a store, and those that do not are named.

A backend's own error tells that a connection broke or a time ran out, rarely whose. A rank that stops for a reason of
its own (no memory, a bad input) leaves that reason instead of its signature.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_WAITING = "waiting"
_STOPPED = "stopped: "
_POLL_SECONDS = 0.05
_STORE_GRACE = 1.0
"""Seconds that a store may take to answer; one whose host is stopped never does."""


class Store(Protocol):
    """What is used of a ``torch.distributed`` store."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there; returns at once."""

    def get(self, key: str, /) -> bytes:
        """Read."""


class RollCall:
    """Signatures of the ranks of one group.

    ``patience`` is how many seconds a rank may take to notice that something is wrong.
    """

    def __init__(self, store: Store, group: str, rank: int, size: int, patience: float) -> None:
        self._store = store
        self._keys = [f"roll call/{group}/{number}" for number in range(size)]
        self._rank = rank
        self._patience = patience

    def leave(self, reason: str) -> None:
        """Sign off with ``reason``: this rank stops, and the others should know why."""
        self._in_time(lambda: self._store.set(self._keys[self._rank], f"{_STOPPED}{reason}"))

    def answers(self) -> dict[int, str]:
        """Sign, and wait for the others; what each one wrote, by rank, of those that did in time.

        Once a rank has left with a reason, nobody else is waited for. With a store that fails meanwhile, only reasons
        are returned: whether the other ranks are alive is not known then.
        """
        notes: dict[int, str] = {}
        if self._in_time(lambda: self._collect(notes)):
            return notes
        return {rank: note for rank, note in list(notes.items()) if _is_reason(note)}

    def _collect(self, notes: dict[int, str]) -> None:
        self._store.set(self._keys[self._rank], _WAITING)
        deadline = time.monotonic() + self._patience
        missing = set(range(len(self._keys)))
        while missing and time.monotonic() < deadline and not any(map(_is_reason, notes.values())):
            for rank in sorted(missing):
                if self._store.check([self._keys[rank]]):
                    notes[rank] = self._store.get(self._keys[rank]).decode()
            missing -= set(notes)
            time.sleep(_POLL_SECONDS if missing else 0)

    def _in_time(self, work: Callable[[], None]) -> bool:
        """Run ``work``, but not for long: a store can hang too, or be gone with the rank that hosts it.

        Whether it came to its end.
        """
        done = threading.Event()

        def attempt() -> None:
            try:
                work()
            except RuntimeError:
                return
            done.set()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(self._patience + _STORE_GRACE)
        return done.is_set()


def _is_reason(note: str) -> bool:
    return note.startswith(_STOPPED)


def verdict(notes: Mapping[int, str], names: Sequence[int]) -> str:
    """Who is to blame, given what each rank wrote; ``names`` are the ranks' numbers in the world, by group rank.

    Empty when everybody answered and nobody had a reason.
    """
    reasons = [
        f"rank {names[rank]} stopped ({note[len(_STOPPED) :]})"
        for rank, note in sorted(notes.items())
        if _is_reason(note)
    ]
    if reasons:
        return ", ".join(reasons)
    if not notes:
        return "the ranks' common store does not answer: the rank that hosts it, usually rank 0, is gone or hangs"
    silent = [str(name) for rank, name in enumerate(names) if rank not in notes]
    if silent:
        return f"no answer from rank {', rank '.join(silent)} (dead or hanging)"
    return ""
