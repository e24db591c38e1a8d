"""From placements to rows: what each strategy does on the half it placed by and on the other; then tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from time import process_time
from typing import Any

from rich.table import Table

from fairseq_moe_opt.placement import (
    DEFAULT_STRATEGY,
    Cluster,
    LayerBalance,
    LoadHistory,
    evaluate,
    lower_bounds,
    place,
)

RIVAL = "eplb"
BOUND = "lower bound"


@dataclass(frozen=True)
class Trace:
    """A history to be measured on, and whether its experts are correlated by construction."""

    name: str
    history: LoadHistory
    correlated: bool = False


@dataclass(frozen=True)
class Row:
    """One strategy on one trace, ranks and memory; loads are shares of a batch's rows, means over layers.

    Attributes:
        trace: its name.
        experts: E.
        ranks: W.
        spare_slots: room for replicas, all ranks together.
        strategy: a registered name, or ``lower bound``, which holds for the batches of the second half.
        first_objective: the paper's objective on the half it placed by; None for the bound.
        first_avg_max_load: Avg Max Load there; None for the bound.
        max_load: Max Load on the other half.
        avg_max_load: Avg Max Load on the other half.
        by_layer: the three, and ``first_max_load``, of every layer.
        seconds: of processor time to place all layers.
    """

    trace: str
    experts: int
    ranks: int
    spare_slots: int
    strategy: str
    first_objective: float | None
    first_avg_max_load: float | None
    max_load: float
    avg_max_load: float
    by_layer: dict[str, dict[str, float]]
    seconds: float

    @property
    def case(self) -> tuple[str, int, int]:
        """What is compared: trace, ranks, memory."""
        return self.trace, self.ranks, self.spare_slots

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dump``; of single layers the file lists the losses alone."""
        values = {field: value for field, value in asdict(self).items() if field != "by_layer"}
        return {field: round(value, 6) if isinstance(value, float) else value for field, value in values.items()}


def measure(trace: Trace, num_ranks: int, spare_slots: int, strategies: Sequence[str]) -> list[Row]:
    """The paper's protocol (section 4.4) for each strategy, and the bound of the second half."""
    first, second = trace.history.halves()
    cluster = Cluster.even(num_ranks, trace.history.num_experts, spare_slots=spare_slots)
    rows = [_measured(trace, first, second, cluster, name) for name in strategies]
    return [*rows, _bound(trace, second, cluster)]


def _measured(trace: Trace, first: LoadHistory, second: LoadHistory, cluster: Cluster, strategy: str) -> Row:
    started = process_time()
    placement = place(first, cluster, strategy)
    seconds = process_time() - started
    seen, unseen = evaluate(placement, first), evaluate(placement, second)
    by_layer = {name: _layer(seen[name], unseen[name]) for name in first.layers}
    means = {field: mean(layer[field] for layer in by_layer.values()) for field in next(iter(by_layer.values()))}
    return Row(
        *_case(trace, cluster),
        strategy=strategy,
        first_objective=means["first_objective"],
        first_avg_max_load=means["first_avg_max_load"],
        max_load=means["max_load"],
        avg_max_load=means["avg_max_load"],
        by_layer=by_layer,
        seconds=seconds,
    )


def _layer(seen: LayerBalance, unseen: LayerBalance) -> dict[str, float]:
    return {
        "first_objective": seen.objective,
        "first_avg_max_load": seen.avg_max_load,
        "first_max_load": seen.max_load,
        "max_load": unseen.max_load,
        "avg_max_load": unseen.avg_max_load,
    }


def _bound(trace: Trace, second: LoadHistory, cluster: Cluster) -> Row:
    by_layer = {name: asdict(lower_bounds(second.shares(name), cluster)) for name in second.layers}
    return Row(
        *_case(trace, cluster),
        strategy=BOUND,
        first_objective=None,
        first_avg_max_load=None,
        max_load=mean(layer["max_load"] for layer in by_layer.values()),
        avg_max_load=mean(layer["avg_max_load"] for layer in by_layer.values()),
        by_layer=by_layer,
        seconds=0.0,
    )


def _case(trace: Trace, cluster: Cluster) -> tuple[str, int, int, int]:
    num_experts = trace.history.num_experts
    return trace.name, num_experts, cluster.num_ranks, cluster.num_slots - num_experts


@dataclass(frozen=True)
class Loss:
    """A case in which the default strategy does worse than EPLB at equal memory.

    Attributes:
        trace, ranks, spare_slots: the case.
        layer: one layer, or ``mean`` of all.
        metric: ``first_objective`` or ``avg_max_load``.
        ours, theirs: the two values.
    """

    trace: str
    ranks: int
    spare_slots: int
    layer: str
    metric: str
    ours: float
    theirs: float


def losses(rows: Sequence[Row]) -> list[Loss]:
    """Every loss of the default strategy: of the objective on the first half, of Avg Max Load on the second."""
    found: list[Loss] = []
    for ours, theirs in _pairs(rows):
        for metric in ("first_objective", "avg_max_load"):
            compared = {
                layer: (ours.by_layer[layer][metric], theirs.by_layer[layer][metric]) for layer in ours.by_layer
            }
            compared["mean"] = (getattr(ours, metric), getattr(theirs, metric))
            found += [
                Loss(*ours.case, layer, metric, one, other)
                for layer, (one, other) in compared.items()
                if one > other + 1e-9
            ]
    return found


def summary(rows: Sequence[Row], traces: Sequence[Trace]) -> dict[str, Any]:
    """The default strategy against EPLB over all cases: wins and losses, and the mean ratios of Avg Max Load."""
    correlated = {trace.name for trace in traces if trace.correlated}
    pairs = list(_pairs(rows))
    lost = losses(rows)
    ratios = [(ours.trace in correlated, ours.avg_max_load / theirs.avg_max_load) for ours, theirs in pairs]
    return {
        "strategy": DEFAULT_STRATEGY,
        "rival": RIVAL,
        "cases": len(pairs),
        "layers": sum(len(ours.by_layer) for ours, _ in pairs),
        "lost_objective_layers": sum(one.layer != "mean" and one.metric == "first_objective" for one in lost),
        "lost_avg_max_load_cases": sum(one.layer == "mean" and one.metric == "avg_max_load" for one in lost),
        "lost_avg_max_load_layers": sum(one.layer != "mean" and one.metric == "avg_max_load" for one in lost),
        "mean_ratio": mean(ratio for _, ratio in ratios),
        "mean_ratio_correlated": mean([ratio for yes, ratio in ratios if yes]) if correlated else None,
    }


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """The default strategy's row and EPLB's, case by case."""
    rival = {row.case: row for row in rows if row.strategy == RIVAL}
    yield from ((row, rival[row.case]) for row in rows if row.strategy == DEFAULT_STRATEGY)


def table_of(rows: Sequence[Row], spare: bool) -> Table:
    """Avg Max Load / Max Load on the second half: a line a case, a column a strategy."""
    chosen = [row for row in rows if bool(row.spare_slots) == spare]
    memory = "10 % spare slots" if spare else "no spare slots"
    table = Table(title=f"second half, Avg Max Load / Max Load, means over layers: {memory}")
    names = list(dict.fromkeys(row.strategy for row in chosen))
    for heading in ("trace", "ranks", "ideal"):
        table.add_column(heading, justify="left" if heading == "trace" else "right")
    for name in names:
        table.add_column(f"{name} *" if name == DEFAULT_STRATEGY else name, justify="right")
    for case in dict.fromkeys(row.case for row in chosen):
        cells = {row.strategy: f"{row.avg_max_load:.4f} / {row.max_load:.3f}" for row in chosen if row.case == case}
        table.add_row(case[0], str(case[1]), f"{1 / case[1]:.4f}", *(cells[name] for name in names))
    return table


def losses_table(found: Sequence[Loss]) -> Table:
    """The losses on means, one a line; those on single layers are in the JSON file."""
    table = Table(title=f"where {DEFAULT_STRATEGY} is worse than {RIVAL} at equal memory, means over layers")
    for heading in ("trace", "ranks", "spare slots", "metric", DEFAULT_STRATEGY, RIVAL):
        table.add_column(heading)
    for one in found:
        if one.layer == "mean":
            cells = (one.trace, one.ranks, one.spare_slots, one.metric, f"{one.ours:.5f}", f"{one.theirs:.5f}")
            table.add_row(*map(str, cells))
    return table
