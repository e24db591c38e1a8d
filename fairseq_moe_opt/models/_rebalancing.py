"""Experts of a running model move between ranks: at the beginning of a turn, when no rank is within a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fairseq_moe_opt.build import Rebalancer
from fairseq_moe_opt.models._block import MoEBlock
from fairseq_moe_opt.moe.exchange_report import RebalanceReport
from fairseq_moe_opt.parallel import ExpertSpread


class TurnRebalancing:
    """Counts the runs of a model's first sparse stack, by whichever rank, and moves experts after every so many.

    What moves them is made at the first run: before, fairseq may still change the model's device and dtype.

    Args:
        spread: which rank holds what in the beginning.
        blocks: the model's sparse blocks.
        every: runs of the stack.
    """

    def __init__(self, spread: ExpertSpread, blocks: Sequence[MoEBlock], every: int) -> None:
        self._spread, self._blocks, self._every = spread, tuple(blocks), every
        self._rebalancer: Rebalancer | None = None
        self._runs = 0

    @property
    def report(self) -> RebalanceReport:
        """What moving took so far."""
        return RebalanceReport() if self._rebalancer is None else self._rebalancer.report

    def run_begins(self) -> None:
        """A run of the first sparse stack is next; all ranks say so at the same time."""
        if self._rebalancer is None:
            layers = {block.spec.layer.name: block.engine for block in self._blocks}
            shares = {block.spec.layer.name: block.share() for block in self._blocks}
            self._rebalancer = Rebalancer(self._spread, layers, shares)
        elif self._runs % self._every == 0:
            self._rebalancer.by_loads()
            for block in self._blocks:
                block.held = self._held(self._rebalancer, block)
        self._runs += 1

    def _held(self, rebalancer: Rebalancer, block: MoEBlock) -> Sequence[int]:
        slots: Mapping[str, Sequence[Sequence[int]]] = rebalancer.placement.layers
        return tuple(slots[block.spec.layer.name][self._spread.ranks.rank])
