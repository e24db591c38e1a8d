"""Where each of several processes writes what they were all told to write to one place."""

from __future__ import annotations

from pathlib import Path

from torch import distributed as dist

from fairseq_moe_opt.parallel.collectives import Collectives


def own_number(ranks: Collectives | None) -> int | None:
    """This process's number among ``ranks``, else in torch's process group; None for one that is alone."""
    if ranks is not None:
        return ranks.rank
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.get_rank() if several else None


def own_file(path: str | Path, number: int | None) -> Path:
    """``report.json``, or ``report.rank-1.json`` for one of several processes."""
    whole = Path(path)
    return whole if number is None else whole.with_name(f"{whole.stem}.rank-{number}{whole.suffix}")


def own_folder(path: str | Path, number: int | None) -> Path:
    """``profile``, or ``profile/rank-1`` for one of several processes."""
    return Path(path) if number is None else Path(path) / f"rank-{number}"
