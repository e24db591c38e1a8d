"""Which ranks share the experts of the models that are being built, and what these ranks have to agree on.

fairseq builds models deep inside its commands and hands nothing of ours through, so the ranks are told by a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch

from fairseq_moe_opt.build import spread_experts
from fairseq_moe_opt.checkpoints import CheckpointIndex, checkpoint_fingerprint
from fairseq_moe_opt.models._turns import Turns
from fairseq_moe_opt.moe.kernels import choose_kernel
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ALL_REDUCE, ALL_TO_ALL, Collectives, ExpertSpread, agree, follow_first
from fairseq_moe_opt.placement import Placement


@dataclass(frozen=True)
class ExpertSharing:
    """Ranks that share experts.

    Attributes:
        ranks: usually a :class:`~fairseq_moe_opt.parallel.ProcessGroupRanks`.
        device: where models are going to be.
        placement: which rank holds which expert; None gives them away in order, in equal parts.
        same_batch: whether all ranks compute the same batches; else each has its own, and they take turns.
        turns: of all models built in this context.
    """

    ranks: Collectives
    device: torch.device
    placement: Placement | None = None
    same_batch: bool = False
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", Turns(self.ranks))

    def settled(self, options: MoEOptions) -> MoEOptions:
        """``options`` with what ``auto`` cannot mean here: a router knows nothing of what other ranks will send."""
        guesses = options.buffered and options.prefetch == "auto" and self.device.type != "cpu"
        return replace(options, prefetch="previous") if guesses else options

    def spread(self, layers: Sequence[TraceLayer], options: MoEOptions) -> ExpertSpread:
        """Which experts are whose.

        Raises ParallelError on every rank when ranks differ in options or placement, PlacementError or OptionError
        when they agree on what is wrong.
        """
        facts = {f"option moe_{name}": value for name, value in options.alike_on_ranks().items()}
        agree(self.ranks, {"placement": "contiguous" if self.placement is None else self.placement.label, **facts})
        exchange = ALL_REDUCE if self.same_batch else ALL_TO_ALL
        return spread_experts(layers, self.ranks, options, self.placement, exchange)

    def agree_on(self, index: CheckpointIndex) -> None:
        """Compare what is about to be read; ParallelError on every rank when it is not the same."""
        agree(self.ranks, {"checkpoint": checkpoint_fingerprint(index)})


class AgreedKernel:
    """What ``auto`` stands for on rank 0 is what it stands for on every rank, for each kind of weights once."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._chosen: dict[tuple[str, torch.device, torch.dtype], str] = {}

    def settled(self, options: MoEOptions, device: torch.device, dtype: torch.dtype) -> MoEOptions:
        """``options`` with a kernel; every rank asks at the same time."""
        if options.buffered:  # its kernel is always the same
            return options
        asked = (options.kernel, device, dtype)
        if asked not in self._chosen:
            own = choose_kernel(*asked).name
            agreed = follow_first(self._ranks, own)
            # Where auto is the same here it stays auto, which can still take another kernel for another activation.
            self._chosen[asked] = options.kernel if agreed == own else agreed
        return replace(options, kernel=self._chosen[asked])


_SHARING: ContextVar[ExpertSharing | None] = ContextVar("sharing_of_experts", default=None)


def current_sharing() -> ExpertSharing | None:
    """The ranks that models built now share their experts with; None for a process that has all experts."""
    return _SHARING.get()


@contextmanager
def sharing_experts(sharing: ExpertSharing) -> Iterator[ExpertSharing]:
    """Spread the experts of all sparse models that are built and loaded in the context; every rank enters it."""
    token = _SHARING.set(sharing)
    try:
        yield sharing
    finally:
        _SHARING.reset(token)
