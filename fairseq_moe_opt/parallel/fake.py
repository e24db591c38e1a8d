"""Several ranks in one process, a thread each: the exchanges' own code on lists, for tests of every shape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import torch
from torch import Tensor

from fairseq_moe_opt.errors import ParallelError

T = TypeVar("T")


class _Done:
    def wait(self) -> None:
        """It is done."""


class FakeRanks:
    """One rank of a world of threads; implements ``Collectives``."""

    def __init__(self, rank: int, board: list[object], barrier: threading.Barrier) -> None:
        self._rank = rank
        self._board = board
        self._barrier = barrier

    @property
    def rank(self) -> int:
        """This thread."""
        return self._rank

    @property
    def size(self) -> int:
        """W."""
        return len(self._board)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_splits: Sequence[int] | None = None,
        sent_splits: Sequence[int] | None = None,
    ) -> _Done:
        """Done at once; ParallelError when a block has another shape than its receiver expects, or another dtype."""
        parts = self._parts(sent, sent_splits)
        blocks = [theirs[self._rank].clone() for theirs in self._meet(parts)]
        for source, (block, place) in enumerate(zip(blocks, self._parts(received, received_splits), strict=True)):
            if (block.shape, block.dtype) != (place.shape, place.dtype):
                raise ParallelError(f"rank {source} sends {block.shape}, but rank {self._rank} expects {place.shape}")
            place.copy_(block)
        self._meet(None)
        return _Done()

    def add_up(self, tensor: Tensor) -> None:
        """Summed in rank order."""
        total = torch.stack(self._meet(tensor)).sum(0)
        self._meet(None)
        tensor.copy_(total)

    def maximum(self, value: int) -> int:
        """The largest."""
        return max(self._meet(value))

    def gather_objects(self, value: object) -> list[object]:
        """By rank."""
        return self._meet(value)

    def _parts(self, tensor: Tensor, splits: Sequence[int] | None) -> tuple[Tensor, ...]:
        lengths = [tensor.shape[0] // self.size] * self.size if splits is None else list(splits)
        return torch.split(tensor, lengths)

    def _meet(self, value: T) -> list[T]:
        """Everybody's ``value``, by rank. The second wait keeps the board until all have read it."""
        try:
            self._board[self._rank] = value
            self._barrier.wait()
            values = list(self._board)
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise ParallelError(f"rank {self._rank} waits for another one that has failed") from None
        return cast("list[T]", values)


def run_ranks(size: int, body: Callable[[FakeRanks], T], timeout: float = 20.0) -> list[T]:
    """What ``body`` returns on each of ``size`` ranks; raises what the first failing rank raised.

    ``timeout`` is in seconds, for each collective. Modes such as ``torch.no_grad`` are a thread's own: set them within
    ``body``.
    """
    barrier = threading.Barrier(size, timeout=timeout)
    board: list[object] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> T:
        try:
            return body(FakeRanks(rank, board, barrier))
        except BaseException as error:
            errors.append(error)  # before ranks that wait for this one fail too
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
