"""The collectives of a ``torch.distributed`` process group: NCCL on GPUs, gloo on CPU.

Both send blocks of different lengths, in every dtype that is asked of them (float32, bfloat16, float16; int64 for
counts). Gloo reports a peer that is gone at once, and one that hangs after the group's timeout; either becomes one
ParallelError that names the rank. NCCL, by torch's default, ends the process from a watchdog of its own after the
timeout; with ``TORCH_NCCL_BLOCKING_WAIT=1`` it raises, and is explained like gloo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.parallel.roll_call import RollCall, verdict

_MOST_PATIENCE = 10.0
_PATIENCE_SHARE = 0.5
"""Of the timeout: how long ranks that are alive may take to notice a failure; ``_MOST_PATIENCE`` seconds at most."""


class ProcessGroupRanks:
    """The ranks of ``group``; implements ``Collectives``.

    Args:
        group: as ``torch.distributed`` made it; None for the whole world (ParallelError when there is none).
        device: where small tensors of this class's own are put: a GPU for NCCL.
        timeout: seconds, set as the group's: then a rank that does not take part is given up. None leaves it alone.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout: float | None = None,
    ) -> None:
        group = group or dist.group.WORLD
        if group is None:
            raise ParallelError("torch.distributed is not initialised: call init_process_group first")
        if timeout is not None:
            group.set_timeout(timedelta(seconds=timeout))
        self._group = group
        self._device = torch.device(device)
        self._names = dist.get_process_group_ranks(group)
        patience = _MOST_PATIENCE if timeout is None else min(_MOST_PATIENCE, _PATIENCE_SHARE * timeout)
        self._roll_call = RollCall(group.get_group_store(), group.group_name, group.rank(), group.size(), patience)

    @property
    def rank(self) -> int:
        """This process in the group."""
        return self._group.rank()

    @property
    def size(self) -> int:
        """W."""
        return self._group.size()

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_splits: Sequence[int] | None = None,
        sent_splits: Sequence[int] | None = None,
    ) -> Work:
        """See ``Collectives``."""
        output_splits = None if received_splits is None else list(received_splits)
        input_splits = None if sent_splits is None else list(sent_splits)
        with self.explained("all-to-all"):
            work = dist.all_to_all_single(received, sent, output_splits, input_splits, group=self._group, async_op=True)
        return Work(self, work)

    def add_up(self, tensor: Tensor) -> None:
        """See ``Collectives``."""
        with self.explained("all-reduce"):
            dist.all_reduce(tensor, group=self._group)

    def maximum(self, value: int) -> int:
        """See ``Collectives``."""
        largest = torch.tensor([value], device=self._device)
        with self.explained("all-reduce"):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
            return int(largest.item())

    def gather_objects(self, value: object) -> list[object]:
        """See ``Collectives``; with NCCL, on the process's current GPU."""
        values: list[object] = [None] * self.size
        with self.explained("all-gather"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def __deepcopy__(self, memo: dict[int, object]) -> ProcessGroupRanks:
        return self  # a copied model talks to the same ranks

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Raise a backend's error within as one ParallelError that names the rank at fault."""
        try:
            yield
        except RuntimeError as error:
            blamed = verdict(self._roll_call.answers(), self._names)
            raise ParallelError(_message(what, self._names[self.rank], blamed, error)) from error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a rank's whole work: what stops this rank is told to the others, whose collectives will fail."""
        try:
            yield
        except ParallelError:
            raise
        except BaseException as error:
            self._roll_call.leave(f"{type(error).__name__}: {_first_line(error)}")
            raise


class Work:
    """A collective under way; implements ``Pending``."""

    def __init__(self, ranks: ProcessGroupRanks, work: dist.Work | None) -> None:
        self._ranks = ranks
        self._work = work

    def wait(self) -> None:
        """On a GPU, the current stream waits, not the host."""
        if self._work is not None:
            with self._ranks.explained("all-to-all"):
                self._work.wait()


def _message(what: str, rank: int, blamed: str, error: BaseException) -> str:
    reason = blamed or "every rank answers, so the network, or a timeout that is too short, is to blame"
    return (
        f"{what} on rank {rank} failed: {reason}. Start all ranks again, with a longer timeout if one was only slow "
        f"({_gist(error)})"
    )


def _gist(error: BaseException) -> str:
    """The first sentence of a backend's error, without the place in its source that it begins with."""
    return re.sub(r"^\[[^]]*]\s*", "", _first_line(error)).partition(". ")[0]


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else ""
