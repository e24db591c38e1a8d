"""What a layer sent to other ranks and received from them, by direction, and what it computed for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager as Context
from contextlib import nullcontext
from dataclasses import dataclass

COUNTS, DISPATCH, COMBINE = "counts", "dispatch", "combine"
DIRECTIONS = (COUNTS, DISPATCH, COMBINE)
"""Sizes of what follows, rows to their experts, results back."""


@dataclass(frozen=True)
class Traffic:
    """What was handed to collectives in one direction, and what came out of them.

    The rank's own share takes part in an all-to-all like any other: it is in the totals, and left out of ``leaving``
    and ``arriving``. Of an all-reduce, what is handed over counts as leaving and arriving once.

    Attributes:
        calls: collectives.
        elements_sent: numbers handed over, of all dtypes.
        elements_received: numbers received.
        bytes_sent: handed over.
        bytes_received: received.
        bytes_leaving: of those sent, to other ranks.
        bytes_arriving: of those received, from other ranks.
    """

    calls: int = 0
    elements_sent: int = 0
    elements_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_leaving: int = 0
    bytes_arriving: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ExchangeReport:
    """What a layer's exchange did.

    Attributes:
        kind: of exchange: ``all-to-all``, ``all-reduce``, ``padded``.
        rank: of this process among those that share the experts.
        num_ranks: W.
        traffic: by direction.
        slot_rows: rows that this rank computed, for whomever, by local slot; since experts last moved, where they do.
    """

    kind: str
    rank: int
    num_ranks: int
    traffic: dict[str, Traffic]
    slot_rows: tuple[int, ...]


@dataclass(frozen=True)
class RebalanceReport:
    """What moving experts between ranks took.

    Attributes:
        times: that ranks took up another placement; one that is the running one does not count.
        experts_moved: copies that some rank had not before, of all ranks and layers together.
        experts_received: those of them that came to this rank.
        bytes_sent: weights that this rank sent to others; 0 where experts are buffered, which are read from the files.
        bytes_received: weights that it got from others.
        seconds: of this rank, agreement and finding a placement included.
    """

    times: int = 0
    experts_moved: int = 0
    experts_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0

    def __add__(self, other: RebalanceReport) -> RebalanceReport:
        return RebalanceReport(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class ExchangeCounters:
    """Running sums of one layer's exchange; safe to add to from several threads.

    Attributes:
        watch: gives the context that a collective is started or waited for in, by its direction; None while nobody
            looks.
    """

    def __init__(self, kind: str, rank: int, num_ranks: int, num_slots: int) -> None:
        self._identity = (kind, rank, num_ranks)
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self.watch: Callable[[str], Context[None]] | None = None
        self.reset()

    def timed(self, direction: str) -> Context[None]:
        """The context for a collective of ``direction``; does nothing while nobody looks."""
        return nullcontext() if self.watch is None else self.watch(direction)

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self._traffic = dict.fromkeys(DIRECTIONS, Traffic())
            self._rows = [0] * self._num_slots

    def have_slots(self, num_slots: int) -> None:
        """Other experts are in the local slots now, ``num_slots`` of them: their rows are counted from 0."""
        with self._lock:
            self._num_slots = num_slots
            self._rows = [0] * num_slots

    def add(self, direction: str, traffic: Traffic) -> None:
        """Count one collective."""
        with self._lock:
            self._traffic[direction] += traffic

    def add_rows(self, counts: tuple[int, ...]) -> None:
        """Count the rows of each local slot that arrived to be computed."""
        with self._lock:
            self._rows = [total + count for total, count in zip(self._rows, counts, strict=True)]

    def __deepcopy__(self, memo: dict[int, object]) -> ExchangeCounters:
        return ExchangeCounters(*self._identity, self._num_slots)

    def __reduce__(self) -> tuple[type[ExchangeCounters], tuple[str, int, int, int]]:
        # As for LayerCounters: a copied or pickled model starts counting afresh.
        return ExchangeCounters, (*self._identity, self._num_slots)

    def snapshot(self) -> ExchangeReport:
        """The sums so far."""
        with self._lock:
            return ExchangeReport(*self._identity, dict(self._traffic), tuple(self._rows))
