"""Becoming one of several ranks that a launcher has started, and failing as one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store

from fairseq_moe_opt.parallel.process_group import ProcessGroupRanks

OTHERS_ASK_WITHIN = 10.0
"""Seconds that rank 0 stays after it has failed, at most; it is as long only where several ranks are dead."""
_FAILED = "launch/failed"


def own_device(name: str | None) -> torch.device:
    """The device asked for, else this rank's GPU where there are GPUs, else the CPU."""
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name or "cpu")


def join(
    device: torch.device,
    timeout: float,
    meeting: str | Store | None = None,
    *,
    rank: int = -1,
    size: int = -1,
) -> ProcessGroupRanks:
    """Meet ``size`` ranks at ``meeting``, an address or a store; None takes all of it from the environment.

    NCCL where ``device`` is a GPU, gloo on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
    if isinstance(meeting, Store):
        dist.init_process_group(backend, store=meeting, timeout=patience, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, meeting, timeout=patience, rank=rank, world_size=size)
    return ProcessGroupRanks(device=device, timeout=timeout)


@contextmanager
def one_message(without_a_word: BaseException) -> Iterator[None]:
    """Of ranks that fail, let the first one raise what it says why with; the others raise ``without_a_word``."""
    try:
        yield
    except Exception:
        if not _fails_first():
            raise without_a_word from None
        raise


def _fails_first() -> bool:
    """Whether no other rank has said so before; True as well where that cannot be found out."""
    group = dist.group.WORLD
    if group is None:
        return True
    try:
        store = group.get_group_store()
        is_first = int(store.add(_FAILED, 1)) == 1
        if group.rank() == 0:
            _let_others_ask(store, group.size())
    except RuntimeError:
        return True
    return is_first


def _let_others_ask(store: Store, size: int) -> None:
    """Rank 0 has the store, which ends with it: let the ranks that fail with it ask first. One of them may be dead."""
    deadline = time.monotonic() + OTHERS_ASK_WITHIN
    while int(store.add(_FAILED, 0)) < size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
