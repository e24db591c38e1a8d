"""Strategies: from one layer's history to where its experts go, one file a family, behind an append-only registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement.history import LoadHistory, Shares
from fairseq_moe_opt.placement.strategies.anti_correlation import place_anti_correlation
from fairseq_moe_opt.placement.strategies.balanced import place_balanced
from fairseq_moe_opt.placement.strategies.contiguous import place_contiguous
from fairseq_moe_opt.placement.strategies.eplb import place_eplb
from fairseq_moe_opt.placement.strategies.greedy import place_greedy
from fairseq_moe_opt.placement.strategies.integer_program import place_exact
from fairseq_moe_opt.placement.strategies.minimax import place_minimax
from fairseq_moe_opt.placement.types import Cluster, Placement, RankSlots

DEFAULT_STRATEGY = "balanced"


@dataclass(frozen=True)
class Strategy:
    """A way to place the experts of one layer.

    Attributes:
        name: what a user calls it by.
        place: ((B, E) shares, cluster) to the placement; deterministic, and fills no slot that the cluster lacks.
        replicates: whether it uses spare slots for replicas.
    """

    name: str
    place: Callable[[Shares, Cluster], RankSlots]
    replicates: bool = False


_REGISTRY: dict[str, Strategy] = {}


def register_strategy(strategy: Strategy) -> None:
    """Add ``strategy`` under its name; a name is taken once (OptionError)."""
    if strategy.name in _REGISTRY:
        raise OptionError("strategy", f"the name {strategy.name!r} is taken")
    _REGISTRY[strategy.name] = strategy


def strategy_names() -> tuple[str, ...]:
    """Every registered name, in order of registration."""
    return tuple(_REGISTRY)


def get_strategy(name: str) -> Strategy:
    """The strategy registered as ``name``; OptionError lists the names there are."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise OptionError("strategy", f"{name!r} is not one of {', '.join(_REGISTRY)}") from None


def place(
    history: LoadHistory, cluster: Cluster, strategy: str = DEFAULT_STRATEGY, *, fingerprint: str = ""
) -> Placement:
    """Place the experts of every layer of ``history``, each layer by itself (paper, section 4.1).

    Args:
        history: what to place by; the paper's protocol gives the first half of a trace.
        cluster: ranks, their slots and nodes.
        strategy: a registered name.
        fingerprint: of the model, kept in the placement.

    Raises:
        OptionError: no such strategy, or fewer slots than experts.
    """
    chosen = get_strategy(strategy)
    cluster.check_room(history.num_experts)
    layers = {name: chosen.place(history.shares(name), cluster) for name in history.layers}
    return Placement(layers, history.num_experts, cluster.num_ranks, chosen.name, fingerprint)


register_strategy(Strategy("contiguous", place_contiguous))
register_strategy(Strategy("greedy", place_greedy))
register_strategy(Strategy("anti-correlation", place_anti_correlation))
register_strategy(Strategy("eplb", place_eplb, replicates=True))
register_strategy(Strategy("balanced", place_balanced, replicates=True))
register_strategy(Strategy("minimax", place_minimax, replicates=True))
register_strategy(Strategy("exact", place_exact))

__all__ = [
    "DEFAULT_STRATEGY",
    "Strategy",
    "get_strategy",
    "place",
    "register_strategy",
    "strategy_names",
]
