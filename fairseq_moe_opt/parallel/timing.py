"""Where the time of an exchange goes: into waiting for other ranks, or into moving what they have."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fairseq_moe_opt.parallel.collectives import Collectives, Pending


class TimedRanks:
    """``ranks``, whose collectives are timed while ``is_on``; implements ``Collectives``.

    Then ranks meet before each collective, so that what passes until all are there is waiting and what follows is the
    exchange itself. Meeting is a small collective more, and on a GPU everything is waited for: it shows where time
    goes, and is off where the whole is timed.

    Attributes:
        is_on: whether collectives are timed; off at first. The same on every rank.
        waiting, exchanging: seconds so far.
    """

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self.is_on = False
        self.reset()

    def reset(self) -> None:
        """Forget the seconds so far."""
        self.waiting = self.exchanging = 0.0

    @property
    def rank(self) -> int:
        """This process among them."""
        return self._ranks.rank

    @property
    def size(self) -> int:
        """W."""
        return self._ranks.size

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_splits: Sequence[int] | None = None,
        sent_splits: Sequence[int] | None = None,
    ) -> Pending:
        """See ``Collectives``."""
        if not self.is_on:
            return self._ranks.all_to_all(received, sent, received_splits, sent_splits)
        self._meet(sent.device)
        start = time.perf_counter()
        pending = self._ranks.all_to_all(received, sent, received_splits, sent_splits)
        self.exchanging += time.perf_counter() - start
        return _TimedPending(self, pending, received.device)

    def add_up(self, tensor: Tensor) -> None:
        """See ``Collectives``."""
        if not self.is_on:
            self._ranks.add_up(tensor)
            return
        self._meet(tensor.device)
        self.exchanged(lambda: self._ranks.add_up(tensor), tensor.device)

    def maximum(self, value: int) -> int:
        """See ``Collectives``; it is a meeting itself."""
        if not self.is_on:
            return self._ranks.maximum(value)
        start = time.perf_counter()
        largest = self._ranks.maximum(value)
        self.waiting += time.perf_counter() - start
        return largest

    def gather_objects(self, value: object) -> list[object]:
        """See ``Collectives``; never timed, as no step needs it."""
        return self._ranks.gather_objects(value)

    def exchanged(self, collective: Callable[[], None], device: torch.device) -> None:
        """Run ``collective`` and add what it takes."""
        start = time.perf_counter()
        collective()
        _finish(device)
        self.exchanging += time.perf_counter() - start

    def _meet(self, device: torch.device) -> None:
        _finish(device)
        start = time.perf_counter()
        self._ranks.maximum(0)
        self.waiting += time.perf_counter() - start

    def __deepcopy__(self, memo: dict[int, object]) -> TimedRanks:
        return self  # a copied model talks to the same ranks


class _TimedPending:
    """A collective under way whose end is timed as well."""

    def __init__(self, ranks: TimedRanks, pending: Pending, device: torch.device) -> None:
        self._ranks, self._pending, self._device = ranks, pending, device

    def wait(self) -> None:
        """See ``Pending``."""
        self._ranks.exchanged(self._pending.wait, self._device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
