"""Loading a model whose experts are spread over ranks: what they have to agree on, and what a rank cannot do alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fairseq_moe_opt.build import spread_experts
from fairseq_moe_opt.checkpoints import CheckpointIndex, checkpoint_fingerprint
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.kernels import choose_kernel
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ALL_TO_ALL, EXCHANGES, Collectives, ExpertSpread, agree, follow_first
from fairseq_moe_opt.placement import Placement


@dataclass(frozen=True)
class ExpertParallel:
    """Experts spread over ranks.

    Attributes:
        ranks: that share the experts, usually a :class:`~fairseq_moe_opt.parallel.ProcessGroupRanks`.
        placement: which rank holds which expert; None gives them away in order, in equal parts.
        exchange: ``all-to-all`` for ranks with batches of their own: tokens go to the ranks that hold their experts.
            ``all-reduce`` for ranks that are all given the same batch, and all get its result: a layer takes one
            collective, which is quicker for the few rows of a small batch, and nothing is computed twice but the
            dense part. OptionError for another name.
    """

    ranks: Collectives
    placement: Placement | None = None
    exchange: str = ALL_TO_ALL

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise OptionError("exchange", f"{self.exchange!r} is not one of {', '.join(EXCHANGES)}")


@dataclass(frozen=True)
class Compared:
    """What every rank must have alike before it reads a weight.

    Attributes:
        index: of the checkpoint.
        config: of the model.
        dtype: of the model, and of its experts' matrices.
        options: that it runs with.
    """

    index: CheckpointIndex
    config: Any
    dtype: tuple[torch.dtype, torch.dtype]
    options: MoEOptions


def spread_over_ranks(
    parallel: ExpertParallel, layers: tuple[TraceLayer, ...], compared: Compared, device: torch.device
) -> tuple[ExpertSpread, MoEOptions]:
    """Compare what ranks were started with; which experts are whose, and the options with rank 0's choices in them.

    Raises ParallelError on every rank when they differ, PlacementError or OptionError when they agree on what is wrong.
    """
    agree(parallel.ranks, _facts(parallel, compared))
    spread = spread_experts(layers, parallel.ranks, compared.options, parallel.placement, parallel.exchange)
    return spread, _with_choices(compared, parallel.ranks, device)


def _facts(parallel: ExpertParallel, compared: Compared) -> Mapping[str, str]:
    return {
        "checkpoint": checkpoint_fingerprint(compared.index),
        "config.json": _short(compared.config.to_json_string(use_diff=False)),
        "dtype": " and ".join(map(str, dict.fromkeys(compared.dtype))),
        "placement": "contiguous" if parallel.placement is None else parallel.placement.label,
        "exchange": parallel.exchange,
        **{f"option {name}": value for name, value in compared.options.alike_on_ranks().items()},
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_choices(compared: Compared, ranks: Collectives, device: torch.device) -> MoEOptions:
    """What ``auto`` stands for here, the same on every rank."""
    options = compared.options
    if options.buffered and options.prefetch == "auto" and device.type != "cpu":
        # auto is router beside a GPU, and that knows nothing of what other ranks will send.
        options = replace(options, prefetch="previous")
    own = choose_kernel(options.kernel, device, compared.dtype[1], apart=options.buffered).name
    agreed = follow_first(ranks, own)
    # Where auto is the same here it stays auto, which can still take another kernel for another activation.
    return options if agreed == own else replace(options, kernel=agreed)
