"""Collectives whose traffic is counted from the very tensors that are handed over."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from fairseq_moe_opt.moe.exchange_report import ExchangeCounters, Traffic
from fairseq_moe_opt.parallel.collectives import Collectives, Pending


class MeteredCollectives:
    """One layer's use of the ranks' collectives, added to its counters."""

    def __init__(self, ranks: Collectives, counters: ExchangeCounters) -> None:
        self._ranks = ranks
        self.counters = counters

    @property
    def rank(self) -> int:
        """This process among the ranks."""
        return self._ranks.rank

    @property
    def size(self) -> int:
        """W."""
        return self._ranks.size

    def all_to_all(
        self,
        direction: str,
        received: Tensor,
        sent: Tensor,
        received_splits: Sequence[int] | None = None,
        sent_splits: Sequence[int] | None = None,
    ) -> Pending:
        """``Collectives.all_to_all``, counted as ``direction``."""
        own = self._own_elements(received, received_splits), self._own_elements(sent, sent_splits)
        self.counters.add(direction, traffic_of(received, sent, *own))
        with self.counters.timed(direction):
            pending = self._ranks.all_to_all(received, sent, received_splits, sent_splits)
        return pending if self.counters.watch is None else _TimedPending(pending, self.counters, direction)

    def add_up(self, direction: str, tensor: Tensor) -> None:
        """``Collectives.add_up``, counted as ``direction``."""
        own = tensor.numel() if self.size == 1 else 0
        self.counters.add(direction, traffic_of(tensor, tensor, own, own))
        with self.counters.timed(direction):
            self._ranks.add_up(tensor)

    def maximum(self, direction: str, value: int) -> int:
        """``Collectives.maximum``, counted as ``direction``: one int64."""
        away = 0 if self.size == 1 else 8
        self.counters.add(direction, Traffic(1, 1, 1, 8, 8, away, away))
        with self.counters.timed(direction):
            return self._ranks.maximum(value)

    def _own_elements(self, tensor: Tensor, splits: Sequence[int] | None) -> int:
        rows = tensor.shape[0] // self.size if splits is None else splits[self.rank]
        return rows * prod(tensor.shape[1:])


class _TimedPending:
    """A collective under way, waiting for which is timed."""

    def __init__(self, pending: Pending, counters: ExchangeCounters, direction: str) -> None:
        self._pending, self._counters, self._direction = pending, counters, direction

    def wait(self) -> None:
        """Wait for it."""
        with self._counters.timed(self._direction):
            self._pending.wait()


def traffic_of(received: Tensor, sent: Tensor, own_received: int, own_sent: int) -> Traffic:
    """One collective's; ``own_*`` are elements of the rank's own share."""
    return Traffic(
        calls=1,
        elements_sent=sent.numel(),
        elements_received=received.numel(),
        bytes_sent=sent.numel() * sent.element_size(),
        bytes_received=received.numel() * received.element_size(),
        bytes_leaving=(sent.numel() - own_sent) * sent.element_size(),
        bytes_arriving=(received.numel() - own_received) * received.element_size(),
    )
