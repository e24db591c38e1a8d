"""The body of ``moe-opt place``: every strategy by the paper's protocol, and a placement to use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.buffering import BELADY, DEFAULT_POLICY
from fairseq_moe_opt.cli.buffer_info import require_same_layers
from fairseq_moe_opt.cli.info import inspect_checkpoint
from fairseq_moe_opt.errors import CheckpointError, InputError, OptionError
from fairseq_moe_opt.moe.trace import Trace, TraceVisit, read_trace
from fairseq_moe_opt.placement import (
    Cluster,
    LoadHistory,
    Placement,
    evaluate,
    history_of,
    lower_bounds,
    network_bytes,
    place,
    rank_loads,
    strategy_names,
)
from fairseq_moe_opt.placement.strategies import get_strategy
from fairseq_moe_opt.rank_caches import simulate_ranks

BOUND = "lower bound"
BEFORE = "contiguous"
"""The strategy that frameworks use where nobody chose one."""

SHOWN_POLICIES = ("lifo", DEFAULT_POLICY, BELADY)
"""The paper's, ours, and the one that knows the future."""


@dataclass(frozen=True)
class PlaceJob:
    """What to place, on what.

    Attributes:
        trace: file.
        ranks, nodes, spare_slots: of the cluster.
        strategy: whose placement is wanted.
        checkpoint: which the trace has to be of, and whose rows are counted in bytes; None to do without.
        slots: experts in each rank's cache of a layer; None for no caches.
    """

    trace: Path
    ranks: int
    strategy: str
    spare_slots: int = 0
    nodes: int = 1
    checkpoint: Path | None = None
    slots: int | None = None

    def cluster(self, num_experts: int, strategy: str) -> Cluster:
        """The slots of ``strategy``; one that does not replicate leaves spare slots empty."""
        spare = self.spare_slots if get_strategy(strategy).replicates else 0
        return Cluster.even(self.ranks, num_experts, spare_slots=spare, num_nodes=self.nodes)


@dataclass(frozen=True)
class Misses:
    """Miss rates with one cache a rank and layer: of the worst rank, and of all together."""

    worst: float
    overall: float


@dataclass(frozen=True)
class Score:
    """One strategy, placed by the first half of the trace, on the second half: means over a phase's layers.

    Attributes:
        phase: ``encoder`` or ``decoder``.
        strategy: its name, or ``lower bound``.
        max_load, avg_max_load, objective: as in ``LayerBalance``; the bound has no objective.
        busiest_rank, busiest_node: in and out of it, dispatch and combine together, for one layer and step; in bytes
            where a checkpoint says how many a row has, else in rows. None for the bound.
        misses: by cache policy; empty where no caches were asked for.
    """

    phase: str
    strategy: str
    max_load: float
    avg_max_load: float
    objective: float | None
    busiest_rank: float | None
    busiest_node: float | None
    misses: Mapping[str, Misses]


@dataclass(frozen=True)
class Comparison:
    """The scores of all strategies, and what is worth keeping.

    Attributes:
        scores: by phase, in order of strategies; the bound is each phase's last.
        skipped: strategy to the reason why it has no score.
        row_bytes: of one row, one way; None where rows are counted.
        placement: of the strategy asked for, by the whole trace.
        loads: phase to strategy to (batches, W) loads in the second half, of that strategy and ``contiguous``; all of a
            phase's layers one after another.
        steps: of the layer with most.
    """

    scores: tuple[Score, ...]
    skipped: Mapping[str, str]
    row_bytes: int | None
    placement: Placement
    loads: Mapping[str, Mapping[str, NDArray[np.float64]]]
    steps: int


def compare(job: PlaceJob) -> Comparison:
    """Place and test.

    Raises OptionError for an option out of its range, CheckpointError for a trace that cannot be read or is of another
    model, InputError for one that is too short or has no counts.
    """
    get_strategy(job.strategy)
    trace = read_trace(job.trace)
    row_bytes = None if job.checkpoint is None else _row_bytes(trace, job.checkpoint, job.trace)
    try:
        history = history_of(trace)
        first, second = history.halves()
    except InputError as error:
        raise InputError(f"{job.trace}: {error} (both halves of every layer's steps must have some)") from None
    placements, skipped = _placements(job, first)
    phases = {phase: _of_phase(trace, second, phase) for phase in dict.fromkeys(one.phase for one in trace.layers)}
    unseen = tuple(_second_half(trace))
    scores = []
    for phase, part in phases.items():
        visits = [visit for visit in unseen if visit.layer in part.layers]
        for placement in placements.values():
            scores.append(_score(phase, placement, part, job, row_bytes or 1, visits))
        scores.append(_bound(phase, part, job.cluster(part.num_experts, job.strategy)))
    cluster = job.cluster(history.num_experts, job.strategy)
    return Comparison(
        scores=tuple(scores),
        skipped=skipped,
        row_bytes=row_bytes,
        placement=place(history, cluster, job.strategy, fingerprint=trace.fingerprint),
        loads={
            phase: {name: _loads(placements[name], part) for name in dict.fromkeys((BEFORE, job.strategy))}
            for phase, part in phases.items()
        },
        steps=max(map(len, history.layers.values())),
    )


def _row_bytes(trace: Trace, checkpoint: Path, trace_path: Path) -> int:
    """D times the size of an element, in the dtype the checkpoint is stored in; 16 bits where it is stored as int8."""
    info = inspect_checkpoint(checkpoint)
    require_same_layers(trace, trace_path, info)
    if info.width is None:
        raise CheckpointError(checkpoint, "does not say how wide it is; leave --checkpoint out to count rows")
    return info.width * (4 if max(info.dtypes, key=info.dtypes.__getitem__) == "float32" else 2)


def _placements(job: PlaceJob, history: LoadHistory) -> tuple[dict[str, Placement], dict[str, str]]:
    """Every strategy's placement by ``history``; those that cannot take this case, and why."""
    placements, skipped = {}, {}
    for name in strategy_names():
        try:
            placements[name] = place(history, job.cluster(history.num_experts, name), name)
        except OptionError as error:
            if name in (job.strategy, BEFORE):  # the cluster itself is wrong, or nothing is left to do
                raise
            skipped[name] = str(error)
    return placements, skipped


def _of_phase(trace: Trace, history: LoadHistory, phase: str) -> LoadHistory:
    return LoadHistory({layer.name: history.layers[layer.name] for layer in trace.layers if layer.phase == phase})


def _second_half(trace: Trace) -> Iterator[TraceVisit]:
    """The visits whose counts are the second of ``LoadHistory.halves``."""
    left = {layer.name: sum(visit.layer == layer.name for visit in trace.visits) // 2 for layer in trace.layers}
    for visit in trace.visits:
        if left[visit.layer]:
            left[visit.layer] -= 1
        else:
            yield visit


def _score(
    phase: str, placement: Placement, history: LoadHistory, job: PlaceJob, row_bytes: int, visits: Sequence[TraceVisit]
) -> Score:
    balances = evaluate(placement, history).values()
    networks = [
        network_bytes(placement.layers[name], counts, row_bytes, job.nodes) for name, counts in history.layers.items()
    ]
    return Score(
        phase=phase,
        strategy=placement.strategy,
        max_load=mean(one.max_load for one in balances),
        avg_max_load=mean(one.avg_max_load for one in balances),
        objective=mean(one.objective for one in balances),
        busiest_rank=mean(one.busiest_rank for one in networks),
        busiest_node=mean(one.busiest_node for one in networks),
        misses={} if job.slots is None else dict(_misses(visits, placement, job.slots)),
    )


def _misses(visits: Sequence[TraceVisit], placement: Placement, slots: int) -> Iterator[tuple[str, Misses]]:
    for policy in SHOWN_POLICIES:
        caches = simulate_ranks(visits, placement, slots, policy)
        yield policy, Misses(caches.worst, caches.overall)


def _bound(phase: str, history: LoadHistory, cluster: Cluster) -> Score:
    bounds = [lower_bounds(history.shares(name), cluster) for name in history.layers]
    max_load, avg_max_load = mean(one.max_load for one in bounds), mean(one.avg_max_load for one in bounds)
    return Score(phase, BOUND, max_load, avg_max_load, None, None, None, {})


def _loads(placement: Placement, history: LoadHistory) -> NDArray[np.float64]:
    """(batches of all layers, W) loads."""
    return np.concatenate([rank_loads(placement.layers[name], history.shares(name)) for name in history.layers])
