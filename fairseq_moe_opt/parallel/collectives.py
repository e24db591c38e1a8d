"""What an exchange asks of the ranks it talks to; a process group and fake ranks both offer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """A collective that is under way."""

    def wait(self) -> None:
        """Return when its result may be used; ParallelError when it failed."""


class Collectives(Protocol):
    """The ranks that share one model's experts. Every rank makes the same calls in the same order.

    Each call raises ParallelError, naming the ranks at fault, when one does not take part in time.
    """

    @property
    def rank(self) -> int:
        """This process among them."""

    @property
    def size(self) -> int:
        """W."""

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_splits: Sequence[int] | None = None,
        sent_splits: Sequence[int] | None = None,
    ) -> Pending:
        """Start sending block r of ``sent`` to rank r, and receiving rank r's into block r of ``received``.

        Splits are lengths of the W blocks along the first dimension; None makes them equal. Both tensors must be
        contiguous and be left alone until ``wait``.
        """

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor``, of the same shape on every rank, by its sum over ranks."""

    def maximum(self, value: int) -> int:
        """The largest ``value`` of any rank."""

    def gather_objects(self, value: object) -> list[object]:
        """The ``value`` of every rank, by rank; anything that can be pickled, for start-up and errors only."""
