"""Moving the experts of a running model between ranks: to a placement that is given, or one that recent loads ask for.

It happens between two calls of the whole model, when no rank is within a forward: a rank that is would wait in an
exchange for rows that others send elsewhere. All ranks move at the same call, and compare first where they go.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fairseq_moe_opt.build.shares import ExpertShare
from fairseq_moe_opt.build.spread import layer_placement, slot_maps_for
from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe.exchange_report import RebalanceReport
from fairseq_moe_opt.moe.layer import MoELayer
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.moe.types import Dispatch, Routing
from fairseq_moe_opt.parallel import (
    AllToAllExchange,
    ExpertSpread,
    SlotMap,
    agree,
    copy_in,
    follow_first,
    nbytes_of,
    send_experts,
    settled,
    transfers,
)
from fairseq_moe_opt.placement import LoadHistory, Placement, replan

REMEMBERED = 256
"""Forwards of a layer, the last ones, whose loads decide."""
MOVED_SHARE = 1 / 8
"""Of all copies of experts: how many may move at one time, but a swap always may."""
LEAST_GAIN = 0.002
"""Share of a layer's expected squared load that each move has to save, or it is not worth its bytes."""

_DISAGREE: Mapping[str, str] = {
    "problem": "do not agree on where experts go",
    "advice": "Call rebalance on all of them with the same",
}


class LoadWindow:
    """A routing observer: how many rows this rank's tokens sent to each expert, forward by forward, the last ones.

    Forwards without a row count too, so that the n-th of every rank is the same one.
    """

    def __init__(self, layers: Sequence[TraceLayer]) -> None:
        self._counts: dict[str, deque[tuple[int, ...]]] = {one.name: deque(maxlen=REMEMBERED) for one in layers}
        self._sizes = {one.name: one.num_experts for one in layers}

    def observe(self, layer: str, routing: Routing, dispatch: Dispatch) -> None:
        """Note a forward of ``layer``."""
        self._counts[layer].append(tuple(dispatch.counts))

    def forwards(self, layer: str) -> int:
        """How many of ``layer`` are remembered."""
        return len(self._counts[layer])

    def counts(self, layer: str) -> torch.Tensor:
        """(B, E) int64."""
        return torch.tensor(list(self._counts[layer]), dtype=torch.int64).view(-1, self._sizes[layer])


class Rebalancer:
    """The experts of one model on their ranks, and what moves them.

    Args:
        spread: which rank holds what now.
        layers: the model's, by name; their exchanges send rows to where experts are.
        shares: this rank's experts of each layer.
        every: calls of the model after which experts move by themselves; 0 for never.
    """

    def __init__(
        self,
        spread: ExpertSpread,
        layers: Mapping[str, MoELayer],
        shares: Mapping[str, ExpertShare],
        every: int = 0,
    ) -> None:
        self._ranks = spread.ranks
        self._maps = dict(spread.slot_maps)
        self._layers, self._shares, self._every = dict(layers), dict(shares), every
        self._traced = tuple(
            TraceLayer(name, layer.counters.phase, layer.counters.num_experts) for name, layer in layers.items()
        )
        self._loads = LoadWindow(self._traced)
        for layer in layers.values():
            layer.observe(self._loads)
        self._calls = 0
        self.report = RebalanceReport()

    @property
    def placement(self) -> Placement:
        """Where experts are now."""
        return layer_placement(self._traced, self._maps)

    @property
    def expert_bytes(self) -> int:
        """Of this rank's experts."""
        return sum(share.nbytes for share in self._shares.values())

    def call_ended(self) -> None:
        """A call of the whole model has ended, on all ranks; experts move after every so many of them."""
        self._calls += 1
        if self._every and self._calls % self._every == 0:
            self.by_loads()

    def to(self, placement: Placement) -> RebalanceReport:
        """Move experts to ``placement``; every rank calls it, between the same two calls of the model.

        Raises ParallelError on every rank when they are given different ones, PlacementError for one of another model
        or number of ranks; nothing has moved then.
        """
        start = time.perf_counter()
        agree(self._ranks, {"placement": _name(placement), **self._running()}, **_DISAGREE)
        return self._take_up(placement, start)

    def by_loads(self) -> RebalanceReport:
        """Move a few experts to where the last forwards of all ranks would have been best balanced.

        Rank 0 decides from everybody's rows: the same arithmetic on another processor may fall differently.
        """
        start = time.perf_counter()
        forwards = {f"forwards of {one.name}": str(self._loads.forwards(one.name)) for one in self._traced}
        agree(self._ranks, {**forwards, **self._running()}, **_DISAGREE)
        history = self._history()
        placement = self._replanned(history) if self._ranks.rank == 0 and history is not None else None
        placement = follow_first(self._ranks, placement)
        return self._take_up(self.placement if placement is None else placement, start)

    def _running(self) -> Mapping[str, str]:
        return {"running placement": _name(self.placement)}

    def _history(self) -> LoadHistory | None:
        """Rows of all ranks in the last forwards; None where there were none."""
        counts = {one.name: self._loads.counts(one.name) for one in self._traced}
        whole = torch.cat([one.reshape(-1) for one in counts.values()]).to(self._device)
        self._ranks.add_up(whole)
        parts = torch.split(whole.cpu(), [one.numel() for one in counts.values()])
        layers = {
            name: np.asarray(part.view(one.shape).numpy())
            for (name, one), part in zip(counts.items(), parts, strict=True)
            if part.any()
        }
        return LoadHistory(layers) if layers else None

    def _replanned(self, history: LoadHistory) -> Placement:
        slots = sum(sum(one.num_slots) for one in self._maps.values())
        return replan(self.placement, history, max_moves=max(2, int(slots * MOVED_SHARE)), least_gain=LEAST_GAIN)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._shares.values())).device

    def _take_up(self, placement: Placement, start: float) -> RebalanceReport:
        wanted = slot_maps_for(self._traced, self._ranks.size, placement)
        maps = {name: settled(self._maps[name], one) for name, one in wanted.items()}
        report = RebalanceReport(times=int(maps != self._maps))
        with torch.inference_mode(False), torch.no_grad():
            for name, after in maps.items():
                report += self._move(name, after)
        report += RebalanceReport(seconds=time.perf_counter() - start)
        self.report += report
        return report

    def _move(self, name: str, after: SlotMap) -> RebalanceReport:
        """Move the experts of one layer: those that travel are sent before their memory is given to others."""
        before, share, exchange = self._maps[name], self._shares[name], self._layers[name].exchange
        if after == before:
            return RebalanceReport()
        if not isinstance(exchange, AllToAllExchange):
            raise MoEError(f"{name}: rows are exchanged by {type(exchange).__name__}, which knows one placement only")
        moves, rank = transfers(before, after), self._ranks.rank
        own = share.tensors(before.by_rank[rank][0])
        received: Mapping[int, torch.Tensor] = {}
        sent = came = 0
        if own:
            delivery = send_experts(self._ranks, moves, share.tensors, nbytes_of(own), share.device)
            received, sent, came = delivery.received, delivery.bytes_sent, delivery.bytes_received
        share.hold(after.by_rank[rank])
        for expert, row in received.items():
            copy_in(row, share.tensors(expert))
        exchange.follow(after)
        self._maps[name] = after
        return RebalanceReport(0, len(moves), sum(move.target == rank for move in moves), sent, came)


def _name(placement: Placement) -> str:
    """Its contents in short: which rank has which experts, in whatever slots."""
    held = {layer: [sorted(set(rank)) for rank in slots] for layer, slots in placement.layers.items()}
    return f"{placement.strategy} {hashlib.sha256(repr(sorted(held.items())).encode()).hexdigest()[:16]}"
