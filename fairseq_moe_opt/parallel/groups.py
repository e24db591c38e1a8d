"""Expert parallelism within a larger job: ranks in groups of ``ep_size``, each group with all experts once or more."""

from __future__ import annotations

from datetime import timedelta

from torch import distributed as dist

from fairseq_moe_opt.errors import OptionError, ParallelError


def group_ranks(world_size: int, ep_size: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive ranks (of one node, as launchers number them) in groups of ``ep_size``.

    OptionError unless ``ep_size`` divides ``world_size``.

    >>> group_ranks(4, 2)
    ((0, 1), (2, 3))
    """
    if ep_size < 1 or world_size % ep_size:
        fitting = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        raise OptionError("ep_size", f"{ep_size} does not divide the {world_size} ranks; right would be {fitting}")
    return tuple(tuple(range(first, first + ep_size)) for first in range(0, world_size, ep_size))


def expert_group(ep_size: int, timeout: float) -> dist.ProcessGroup:
    """The group in which this rank shares experts; every rank of the world must call it. ``timeout`` in seconds.

    Ranks of different groups are data-parallel: they hold the same experts and never wait for each other here.
    """
    if not dist.is_initialized():
        raise ParallelError("torch.distributed is not initialised: call init_process_group first")
    own: dist.ProcessGroup | None = None
    # Every rank makes every group, its own or not: torch.distributed numbers them in order.
    for ranks in group_ranks(dist.get_world_size(), ep_size):
        made = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        if dist.get_rank() in ranks:
            own = made
    if own is None:
        raise ParallelError(f"rank {dist.get_rank()} is in no group of {ep_size}")
    return own
